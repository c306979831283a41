// SPDX-License-Identifier: LGPL-2.1-or-later
// Runs shell commands for the harness, which sits at the other end of a virtio-serial port.
//
// Static, locked in memory and without an allocation after its start, so that it answers while the machine
// around it is short of memory. It depends on nothing else in the guest: not on udev, not on the network.
//
// host -> agent    RUN id deadline_ms bytes\n<command>     KILL id\n       PING id\n      SYSRQ keys\n
// agent -> host    READY boot_id\n      PONG id\n          OUT id bytes\n<bytes>     ERR id bytes\n<bytes>
//                  EXIT id wait_status timed_out\n         STUCK id\n (killed, and still there after GRACE_MS)
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define AGENT_PORT "nbdnfs.agent"
#define VERDICT_PORT "nbdnfs.verdict"
#define VERDICT_LINK "/run/guest/verdict"
#define MAX_JOBS 32
#define MAX_COMMAND (96 * 1024) // an argument of execve() ends at 128 KiB
#define GRACE_MS 10000

struct job {
    long id;
    pid_t pid; // 0: the slot is free
    int pidfd;
    int pipes[2]; // stdout, stderr; -1 once closed
    long deadline_ms;
    bool killed, timed_out, stuck;
};

static struct job jobs[MAX_JOBS];
static char input[MAX_COMMAND + 256];
static size_t input_length;
static int port;
static int sysrq; // /proc/sysrq-trigger, opened while there is memory for it

static long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void nap_ms(long ms)
{
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
}

// The device node of the port that the host calls `wanted`; false while there is none.
static bool find_port(const char *wanted, char *node, size_t size)
{
    bool found = false;
    DIR *folder = opendir("/sys/class/virtio-ports");
    for (struct dirent *entry; folder && !found && (entry = readdir(folder));) {
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t length = read(fd, name, sizeof name - 1);
        close(fd);
        if (length > 0 && (name[strcspn(name, "\n")] = 0, strcmp(name, wanted) == 0)) {
            snprintf(node, size, "/dev/%.200s", entry->d_name);
            found = true;
        }
    }
    if (folder)
        closedir(folder);
    return found;
}

static void send_bytes(const char *data, size_t length)
{
    while (length > 0) {
        ssize_t sent = write(port, data, length);
        if (sent > 0) {
            data += sent;
            length -= (size_t)sent;
        } else {
            poll(&(struct pollfd){.fd = port, .events = POLLOUT}, 1, 1000);
        }
    }
}

static void send_line(const char *format, const char *word, long first, long second)
{
    char line[128];
    int length = snprintf(line, sizeof line, format, word, first, second);
    send_bytes(line, (size_t)length);
}

// Passes on what one pipe holds; closes it at its end. Returns false when there was nothing.
static bool forward(struct job *job, int which)
{
    static char bytes[16384];
    if (job->pipes[which] < 0)
        return false;
    ssize_t length = read(job->pipes[which], bytes, sizeof bytes);
    if (length > 0) {
        send_line("%s %ld %ld\n", which == 0 ? "OUT" : "ERR", job->id, length);
        send_bytes(bytes, (size_t)length);
        return true;
    }
    if (length == 0 || errno != EAGAIN) {
        close(job->pipes[which]);
        job->pipes[which] = -1;
    }
    return false;
}

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (write(fd, text, strlen(text)) < 0)
            perror(path);
        close(fd);
    }
}

static void start_job(long id, long timeout_ms, const char *command)
{
    struct job *job = jobs;
    while (job < jobs + MAX_JOBS && job->pid != 0)
        job++;
    int out[2], err[2];
    if (job == jobs + MAX_JOBS || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0) {
        send_line("%s %ld %ld 0\n", "EXIT", id, 255 << 8);
        return;
    }
    pid_t pid = fork();
    if (pid == 0) {
        setsid();
        write_file("/proc/self/oom_score_adj", "0"); // the agent's own is -1000
        setpriority(PRIO_PROCESS, 0, 0);
        dup2(open("/dev/null", O_RDONLY), 0);
        dup2(out[1], 1);
        dup2(err[1], 2);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    close(out[1]);
    close(err[1]);
    if (pid < 0) {
        close(out[0]);
        close(err[0]);
        send_line("%s %ld %ld 0\n", "EXIT", id, 255 << 8);
        return;
    }
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    fcntl(err[0], F_SETFL, O_NONBLOCK);
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd >= 0)
        fcntl(pidfd, F_SETFD, FD_CLOEXEC);
    *job = (struct job){.id = id, .pid = pid, .pidfd = pidfd, .pipes = {out[0], err[0]}};
    job->deadline_ms = now_ms() + timeout_ms;
}

// A job ends with its shell. What the shell left running in the background keeps running, unheard.
static void end_job(struct job *job, int status)
{
    for (int which = 0; which < 2; which++) {
        while (forward(job, which))
            ;
        if (job->pipes[which] >= 0)
            close(job->pipes[which]);
    }
    if (job->pidfd >= 0)
        close(job->pidfd);
    char line[128];
    int length = snprintf(line, sizeof line, "EXIT %ld %d %d\n", job->id, status, job->timed_out);
    send_bytes(line, (size_t)length);
    job->pid = 0;
}

static void kill_job(struct job *job)
{
    kill(-job->pid, SIGKILL);
    kill(job->pid, SIGKILL); // it may not have reached setsid() yet
    job->killed = true;
}

static void look_after_jobs(void)
{
    for (struct job *job = jobs; job < jobs + MAX_JOBS; job++) {
        int status;
        if (job->pid == 0)
            continue;
        if (waitpid(job->pid, &status, WNOHANG) == job->pid) {
            end_job(job, status);
        } else if (!job->killed && now_ms() > job->deadline_ms) {
            job->timed_out = true;
            kill_job(job);
        } else if (job->killed && !job->stuck && now_ms() > job->deadline_ms + GRACE_MS) {
            send_line("%s %ld\n", "STUCK", job->id, 0);
            job->stuck = true;
        }
    }
}

// What the kernel prints goes to its log: Documentation/admin-guide/sysrq.rst.
static void press_sysrq(const char *keys)
{
    for (; *keys >= 'a' && *keys <= 'z'; keys++)
        if (write(sysrq, keys, 1) < 0)
            perror("/proc/sysrq-trigger");
}

// Carries out the complete requests at the start of the input.
static void take_requests(void)
{
    for (char *end; (end = memchr(input, '\n', input_length)) != NULL;) {
        long id = 0, timeout_ms = 0, bytes = 0;
        *end = 0;
        size_t used = (size_t)(end - input) + 1;
        if (sscanf(input, "RUN %ld %ld %ld", &id, &timeout_ms, &bytes) == 3) {
            if (bytes < 0 || bytes > MAX_COMMAND)
                exit(1);
            if (input_length < used + (size_t)bytes) {
                *end = '\n';
                return;
            }
            char *command = end + 1, saved = command[bytes];
            command[bytes] = 0;
            start_job(id, timeout_ms, command);
            command[bytes] = saved;
            used += (size_t)bytes;
        } else if (sscanf(input, "PING %ld", &id) == 1) {
            send_line("%s %ld\n", "PONG", id, 0);
        } else if (sscanf(input, "KILL %ld", &id) == 1) {
            for (struct job *job = jobs; job < jobs + MAX_JOBS; job++)
                if (job->pid != 0 && job->id == id) {
                    kill_job(job);
                    job->deadline_ms = now_ms();
                }
        } else if (strncmp(input, "SYSRQ ", 6) == 0) {
            press_sysrq(input + 6);
        }
        input_length -= used;
        memmove(input, input + used, input_length);
    }
}

static void wait_for_events(void)
{
    struct pollfd polled[1 + 3 * MAX_JOBS] = {{.fd = port, .events = POLLIN}};
    nfds_t count = 1;
    for (struct job *job = jobs; job < jobs + MAX_JOBS; job++)
        if (job->pid != 0) {
            polled[count++] = (struct pollfd){.fd = job->pidfd, .events = POLLIN};
            polled[count++] = (struct pollfd){.fd = job->pipes[0], .events = POLLIN};
            polled[count++] = (struct pollfd){.fd = job->pipes[1], .events = POLLIN};
        }
    poll(polled, count, 250);
    if (polled[0].revents & POLLHUP)
        nap_ms(100); // no peer: poll() would return at once, again and again
}

int main(void)
{
    char node[256], boot_id[64] = "";
    while (!find_port(AGENT_PORT, node, sizeof node))
        nap_ms(50);
    if ((port = open(node, O_RDWR | O_NONBLOCK | O_CLOEXEC)) < 0) {
        perror(node);
        return 1;
    }
    mkdir("/run/guest", 0755);
    unlink(VERDICT_LINK);
    if (find_port(VERDICT_PORT, node, sizeof node) && symlink(node, VERDICT_LINK) < 0)
        perror(VERDICT_LINK);
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("LANG", "C.UTF-8", 1);
    setenv("HOME", "/root", 1);
    signal(SIGPIPE, SIG_IGN);
    if ((sysrq = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC)) < 0)
        perror("/proc/sysrq-trigger");
    if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0)
        perror("mlockall");

    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, boot_id, sizeof boot_id - 1) > 0)
        boot_id[strcspn(boot_id, "\n")] = 0;
    close(fd);
    send_bytes("READY ", 6);
    send_bytes(boot_id, strlen(boot_id));
    send_bytes("\n", 1);

    for (;;) {
        wait_for_events();
        ssize_t length = read(port, input + input_length, sizeof input - 1 - input_length);
        if (length > 0) {
            input_length += (size_t)length;
            take_requests();
        }
        for (struct job *job = jobs; job < jobs + MAX_JOBS; job++)
            if (job->pid != 0) {
                forward(job, 0);
                forward(job, 1);
            }
        look_after_jobs();
    }
}
