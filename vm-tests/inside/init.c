// SPDX-License-Identifier: LGPL-2.1-or-later
// The whole initramfs: load /modules/* in the order of their names, mount the first disk as root, copy the
// payload of the second one over it (once in the life of a root disk), and become the root's own init.
// The payload must be there before systemd starts, because it may hold units and generators.
// Whatever goes wrong ends in a panic, which ends the guest: the harness then shows this program's last line.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROOT_DISK "/dev/vda"
#define PAYLOAD_DISK "/dev/vdb"

static void die(const char *format, ...)
{
    va_list arguments;
    fprintf(stderr, "guest init: ");
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, ": %s\n", strerror(errno));
    exit(1); // process 1 ends: the kernel panics
}

// Loads and removes every module: what stays in the initramfs stays in memory for ever.
static void load_modules(void)
{
    struct dirent **names;
    int count = scandir("/modules", &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[512];
        if (names[i]->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            die("cannot load %s", path);
        close(fd);
        unlink(path);
    }
}

// Drivers find their devices asynchronously: try for a while.
static void mount_disk(const char *disk, const char *where, unsigned long flags, const char *options)
{
    for (int tries = 0; mount(disk, where, "ext4", flags, options) < 0; tries++) {
        if ((errno != ENOENT && errno != ENXIO) || tries == 1000)
            die("cannot mount %s", disk);
        nanosleep(&(struct timespec){.tv_nsec = 10 * 1000 * 1000}, NULL);
    }
}

static void copy_payload(void)
{
    mount_disk(PAYLOAD_DISK, "/root/mnt", MS_RDONLY, "noload");
    pid_t child = fork();
    if (child == 0) {
        if (chroot("/root") < 0 || chdir("/") < 0)
            die("chroot");
        execl("/bin/cp", "cp", "-a", "/mnt/.", "/", (char *)NULL);
        die("cannot run cp");
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        die("cannot copy the payload");
    umount("/root/mnt");
    int mark = open("/root/.payload", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (mark < 0)
        die("cannot write to the root disk");
    close(mark);
}

int main(void)
{
    mkdir("/dev", 0755);
    mkdir("/root", 0755);
    if (mount("dev", "/dev", "devtmpfs", 0, NULL) < 0)
        die("cannot mount /dev");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);

    load_modules();
    mount_disk(ROOT_DISK, "/root", MS_NOATIME, NULL);
    if (access("/root/.payload", F_OK) < 0)
        copy_payload();

    unlink("/init");
    if (mount("/dev", "/root/dev", NULL, MS_MOVE, NULL) < 0 || chdir("/root") < 0 ||
        mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        die("cannot move to the root disk");
    execl("/sbin/init", "init", (char *)NULL);
    die("cannot start /sbin/init");
}
