// SPDX-License-Identifier: LGPL-2.1-or-later
// The whole initramfs: load /modules/* in the order of their names, mount the root, and become the root's own init.
//
// Without more arguments the root is the first disk, and the payload of the second one is copied over it (once in the
// life of a root disk). The payload must be there before systemd starts, because it may hold units and generators.
//
// guest.nfs=SERVER:PATH and guest.nfs_options= are for a machine without a disk: the root is that folder on an NFS
// server, with the payload in it. With guest.layers=FILE:FILE it is a stack of squashfs images in that folder, the
// first one on top, under an overlay in memory.
//
// Whatever goes wrong ends in a panic, which ends the guest: the harness then shows this program's last line.
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROOT_DISK "/dev/vda"
#define PAYLOAD_DISK "/dev/vdb"

// QEMU's user networking, as vmtest/image.py has it for systemd-networkd.
#define ADDRESS "10.0.2.15"
#define NETMASK "255.255.255.0"
#define CARD "eth0"

#define LAYERS_MAX 8

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

static void pause_ms(long ms)
{
    nanosleep(&(struct timespec){.tv_nsec = ms * 1000 * 1000}, NULL);
}

// Drivers find their devices asynchronously: try for a while.
static void mount_disk(const char *disk, const char *where, unsigned long flags, const char *options)
{
    for (int tries = 0; mount(disk, where, "ext4", flags, options) < 0; tries++) {
        if ((errno != ENOENT && errno != ENXIO) || tries == 1000)
            die("cannot mount %s", disk);
        pause_ms(10);
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

// The value of a kernel argument, or NULL.
static char *argument(const char *name)
{
    static char line[4096];
    static char value[4096];
    size_t length = strlen(name);

    if (line[0] == '\0') {
        FILE *file = fopen("/proc/cmdline", "r");
        if (file == NULL || fgets(line, sizeof line, file) == NULL)
            die("cannot read /proc/cmdline");
        fclose(file);
    }
    for (char *at = line; (at = strstr(at, name)) != NULL; at += length) {
        if ((at == line || at[-1] == ' ') && at[length] == '=') {
            snprintf(value, sizeof value, "%s", at + length + 1);
            value[strcspn(value, " \n")] = '\0';
            return strdup(value);
        }
    }
    return NULL;
}

static void set_address(int sock, unsigned long request, const char *address)
{
    struct ifreq card = {.ifr_name = CARD};
    struct sockaddr_in *at = (struct sockaddr_in *)&card.ifr_addr;

    at->sin_family = AF_INET;
    at->sin_addr.s_addr = inet_addr(address);
    for (int tries = 0; ioctl(sock, request, &card) < 0; tries++) {
        if (errno != ENODEV || tries == 1000)
            die("cannot set %s of %s", address, CARD);
        pause_ms(10);
    }
}

static void start_network(void)
{
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq card = {.ifr_name = CARD, .ifr_flags = IFF_UP | IFF_RUNNING};

    if (sock < 0)
        die("no IPv4");
    set_address(sock, SIOCSIFADDR, ADDRESS);
    set_address(sock, SIOCSIFNETMASK, NETMASK);
    if (ioctl(sock, SIOCSIFFLAGS, &card) < 0)
        die("cannot start %s", CARD);
    close(sock);
}

// The kernel asks the server's mount service itself. The card needs a moment until it sends.
static void mount_nfs(const char *source, const char *where, unsigned long flags)
{
    char *options = argument("guest.nfs_options");

    for (int tries = 0; mount(source, where, "nfs", flags, options) < 0; tries++) {
        if (tries == 100)
            die("cannot mount %s with %s", source, options);
        pause_ms(100);
    }
}

static void mount_squashfs(const char *image, const char *where)
{
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    int number = control < 0 ? -1 : ioctl(control, LOOP_CTL_GET_FREE);
    int file = open(image, O_RDONLY | O_CLOEXEC);
    char path[32];

    snprintf(path, sizeof path, "/dev/loop%d", number);
    int loop = open(path, O_RDONLY | O_CLOEXEC);
    if (number < 0 || file < 0 || loop < 0)
        die("no loop device for %s", image);
    struct loop_config config = {.fd = (unsigned)file, .info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR};
    if (ioctl(loop, LOOP_CONFIGURE, &config) < 0 || mount(path, where, "squashfs", MS_RDONLY, NULL) < 0)
        die("cannot mount %s", image);
    close(loop);
    close(file);
    close(control);
}

// The server's folder and the images stay mounted where no program of the root reaches them.
static void mount_layers(const char *source, char *layers)
{
    char options[1024] = "upperdir=/memory/upper,workdir=/memory/work,lowerdir=";

    mkdir("/nfs", 0755);
    mount_nfs(source, "/nfs", MS_RDONLY);
    mkdir("/memory", 0755);
    if (mount("memory", "/memory", "tmpfs", 0, NULL) < 0)
        die("no tmpfs");
    mkdir("/memory/upper", 0755);
    mkdir("/memory/work", 0755);
    int number = 0;
    for (char *name = strtok(layers, ":"); name != NULL && number < LAYERS_MAX; name = strtok(NULL, ":")) {
        char image[512], where[32];
        snprintf(image, sizeof image, "/nfs/%s", name);
        snprintf(where, sizeof where, "/layer%d", number);
        mkdir(where, 0755);
        mount_squashfs(image, where);
        snprintf(options + strlen(options), sizeof options - strlen(options), "%s%s", number ? ":" : "", where);
        number++;
    }
    if (mount("overlay", "/root", "overlay", MS_NOATIME, options) < 0)
        die("cannot mount the overlay: %s", options);
}

static void mount_root(void)
{
    char *source = argument("guest.nfs"), *layers = argument("guest.layers");

    if (source == NULL) {
        mount_disk(ROOT_DISK, "/root", MS_NOATIME, NULL);
        if (access("/root/.payload", F_OK) < 0)
            copy_payload();
        return;
    }
    start_network();
    if (layers != NULL)
        mount_layers(source, layers);
    else
        mount_nfs(source, "/root", MS_NOATIME);
}

int main(void)
{
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/root", 0755);
    if (mount("dev", "/dev", "devtmpfs", 0, NULL) < 0 || mount("proc", "/proc", "proc", 0, NULL) < 0)
        die("cannot mount /dev or /proc");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);

    load_modules();
    mount_root();
    umount("/proc");

    unlink("/init");
    if (mount("/dev", "/root/dev", NULL, MS_MOVE, NULL) < 0 || chdir("/root") < 0 ||
        mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        die("cannot move to the root");
    execl("/sbin/init", "init", (char *)NULL);
    die("cannot start /sbin/init");
}
