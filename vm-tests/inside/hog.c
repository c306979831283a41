// SPDX-License-Identifier: LGPL-2.1-or-later
// A memory-hungry program that checks every byte it gets back.
//
// P processes hold N MiB of pages between them. The content of a page follows from (seed, process, page number,
// generation); the generation counts how often the page was written. Every pass checks all words of all pages
// in its order, and rewrites some of them in the next generation, so that a page that comes back from an older
// time, from another place, or as zeros, is seen and named. A zipf pass visits as many, some of them often and some not
// at all.
//
// Progress and the verdict are JSON, one object a line, on stdout and to the file given with --report. The
// last line is {"event": "verdict", ...}; a hog that was killed has none, or one with "complete": false.
// With --pause MS it rests before each pass but the first, so that pages lie in swap for a while.
// With --compressible nearly all of a page's words stand there four times each: LZO and LZ4 make a third of it.
// With --until FILE it does one more pass when FILE has appeared, and no further one.
// Exit status: 0 all pages right, 1 wrong pages, 2 it could not start, 3 one of its processes was killed.
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_PROCESSES 64
#define MAX_PASSES 64
#define MAX_MESSAGES 16  // wrong pages that a process describes; the rest are counted
#define LOOK_EVERY_MS 10
#define PROGRESS_EVERY_MS 1000

#define STRIDE 16        // pages, in a strided pass: down a matrix's column, and then the next one

enum order { FILL, SEQUENTIAL, RANDOM, STRIDED, ZIPF, ORDERS };
static const char *const order_names[ORDERS] = {"fill", "sequential", "random", "strided", "zipf"};

static size_t size_mib = 64;
static int processes = 1;
static enum order passes[MAX_PASSES] = {FILL, SEQUENTIAL, RANDOM, SEQUENTIAL};
static int pass_count = 4;
static uint64_t seed = 1;
static unsigned rewrite_percent = 25;
static unsigned pause_ms;
static bool is_compressible;
static long spoiled_page = -1; // process 0 gets it wrong on purpose, to see the check at work
static int report_fd = -1;
static const char *until_path;
static size_t page_bytes; // the kernel's: what is swapped at a time, and counted in /proc/vmstat
static size_t page_words;

// One for each process, which alone writes it; the parent reads.
static struct counters {
    atomic_ulong checked, wrong;
    atomic_ulong done;         // pages of the current pass
    atomic_int passes_done;    // written last in a pass, after:
    _Atomic double finished_s; // when that was
} *counters;

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void die(const char *what)
{
    fprintf(stderr, "hog: %s: %s\n", what, strerror(errno));
    exit(2);
}

// One line to stdout and to the report.
static void say(const char *line)
{
    int fds[] = {STDOUT_FILENO, report_fd};
    for (int i = 0; i < 2; i++)
        for (size_t sent = 0, length = strlen(line); fds[i] >= 0 && sent < length;) {
            ssize_t written = write(fds[i], line + sent, length - sent);
            if (written < 0 && errno != EINTR && errno != EAGAIN)
                break;
            sent += written > 0 ? (size_t)written : 0;
        }
}

// splitmix64 (public domain, Vigna): a bijection that mixes well.
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

// The first two words name the page in clear, the others are a stream that follows from the name and the seed.
static uint64_t word_at(uint64_t key, size_t index, uint64_t id, unsigned generation)
{
    if (is_compressible && index > 1)
        index |= 3;
    return index == 0 ? id : index == 1 ? generation : (key + index * 0x9e3779b97f4a7c15) * (key | 1);
}

static uint64_t page_key(uint64_t id, unsigned generation)
{
    return mix(mix(seed ^ id) ^ generation);
}

static void write_page(uint64_t *page, uint64_t id, unsigned generation)
{
    uint64_t key = page_key(id, generation);
    for (size_t i = 0; i < page_words; i++)
        page[i] = word_at(key, i, id, generation);
}

// Returns the index of the first wrong word, or -1.
static int check_page(const uint64_t *page, uint64_t id, unsigned generation)
{
    uint64_t key = page_key(id, generation);
    for (size_t i = 0; i < page_words; i++)
        if (page[i] != word_at(key, i, id, generation))
            return (int)i;
    return -1;
}

static void shuffle(uint32_t *order, size_t count, uint64_t state)
{
    for (size_t i = count; i > 1; i--) {
        state = mix(state);
        size_t other = state % i;
        uint32_t swapped = order[i - 1];
        order[i - 1] = order[other];
        order[other] = swapped;
    }
}

static void stride(uint32_t *order, size_t count)
{
    for (size_t column = 0; column < STRIDE; column++)
        for (size_t page = column; page < count; page += STRIDE)
            *order++ = (uint32_t)page;
}

// `count` visits to the pages in `ranked`, the first of which is the most popular: the n-th is visited in proportion to
// 1/n (Zipf's law). They take the place of `ranked`.
static void visit_by_rank(uint32_t *ranked, size_t count, uint64_t state)
{
    uint32_t *visits = malloc(count * sizeof *visits);
    double *up_to = malloc(count * sizeof *up_to); // the sum of 1/n so far
    double sum = 0;
    if (!visits || !up_to)
        die("no memory");
    for (size_t i = 0; i < count; i++)
        up_to[i] = sum += 1.0 / (double)(i + 1);
    for (size_t i = 0; i < count; i++) {
        state = mix(state);
        double wanted = (double)(state >> 11) / (double)(1ull << 53) * sum;
        size_t low = 0, high = count - 1;
        while (low < high) {
            size_t middle = low + (high - low) / 2;
            if (up_to[middle] > wanted)
                high = middle;
            else
                low = middle + 1;
        }
        visits[i] = ranked[low];
    }
    memcpy(ranked, visits, count * sizeof *visits);
    free(visits);
    free(up_to);
}

// The pages that a pass visits, in this order.
static void plan(uint32_t *order, size_t count, enum order kind, uint64_t state)
{
    for (size_t i = 0; i < count; i++)
        order[i] = (uint32_t)i;
    if (kind == RANDOM || kind == ZIPF)
        shuffle(order, count, state);
    if (kind == STRIDED)
        stride(order, count);
    if (kind == ZIPF)
        visit_by_rank(order, count, state);
}

// One process: waits for a byte on `go` before each pass.
static void work(int process, size_t page_count, int go)
{
    struct counters *mine = &counters[process];
    uint64_t *pages = mmap(NULL, page_count * page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *generations = calloc(page_count, sizeof *generations);
    uint32_t *order = malloc(page_count * sizeof *order);
    if (pages == MAP_FAILED || !generations || !order)
        die("no memory");

    int messages = 0;
    for (int pass = 0; pass < pass_count; pass++) {
        char byte;
        if (read(go, &byte, 1) != 1)
            exit(2);
        uint64_t pass_seed = mix(seed ^ mix((uint64_t)process << 16 | (uint64_t)pass));
        plan(order, page_count, passes[pass], pass_seed);
        for (size_t i = 0; i < page_count; i++) {
            size_t number = order[i];
            uint64_t *page = pages + number * page_words;
            uint64_t id = (uint64_t)process << 40 | number;
            if (passes[pass] == FILL) {
                write_page(page, id, ++generations[number]);
            } else {
                int wrong = check_page(page, id, generations[number]);
                atomic_fetch_add(&mine->checked, 1);
                if (wrong >= 0) {
                    atomic_fetch_add(&mine->wrong, 1);
                    if (messages++ < MAX_MESSAGES)
                        fprintf(stderr,
                                "hog: process %d page %zu generation %u: wrong from word %d on; "
                                "it calls itself process %ju page %ju generation %ju\n",
                                process, number, generations[number], wrong, (uintmax_t)(page[0] >> 40),
                                (uintmax_t)(page[0] & 0xffffffffff), (uintmax_t)page[1]);
                }
                if (wrong >= 0 || mix(pass_seed ^ number ^ (uint64_t)i << 32) % 100 < rewrite_percent)
                    write_page(page, id, ++generations[number]);
            }
            atomic_store(&mine->done, i + 1);
        }
        if (pass == 0 && process == 0 && spoiled_page >= 0 && (size_t)spoiled_page < page_count)
            pages[((size_t)spoiled_page + 1) * page_words - 1] ^= 1;
        atomic_store(&mine->finished_s, now_s());
        atomic_store(&mine->passes_done, pass + 1);
    }
    exit(0);
}

static unsigned long sum(size_t offset)
{
    unsigned long total = 0;
    for (int i = 0; i < processes; i++)
        total += atomic_load((atomic_ulong *)((char *)&counters[i] + offset));
    return total;
}

// Ends everything when a process is gone that should be there.
static void check_processes(int pass)
{
    int status;
    pid_t pid = waitpid(-1, &status, WNOHANG);
    if (pid <= 0 || (pass == pass_count - 1 && WIFEXITED(status) && WEXITSTATUS(status) == 0))
        return;
    char line[256];
    snprintf(line, sizeof line,
             "{\"event\": \"verdict\", \"complete\": false, \"wrong\": %lu, "
             "\"reason\": \"process %d ended with %s %d in the %s pass\"}\n",
             sum(offsetof(struct counters, wrong)), (int)pid, WIFSIGNALED(status) ? "signal" : "status",
             WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), order_names[passes[pass]]);
    say(line);
    exit(3); // the others die with this process
}

static void wait_for_pass(int pass, size_t total_pages, double started_s)
{
    double told_s = now_s();
    for (;;) {
        int ready = 0;
        for (int i = 0; i < processes; i++)
            ready += atomic_load(&counters[i].passes_done) > pass;
        bool over = ready == processes;
        if (over || now_s() - told_s >= PROGRESS_EVERY_MS / 1e3) {
            char line[256];
            told_s = now_s();
            snprintf(line, sizeof line,
                     "{\"event\": \"progress\", \"pass\": \"%s\", \"done\": %lu, \"pages\": %zu, \"wrong\": %lu, "
                     "\"seconds\": %.1f}\n",
                     order_names[passes[pass]], sum(offsetof(struct counters, done)), total_pages,
                     sum(offsetof(struct counters, wrong)), told_s - started_s);
            say(line);
        }
        if (over)
            return;
        check_processes(pass);
        nanosleep(&(struct timespec){.tv_nsec = LOOK_EVERY_MS * 1000000L}, NULL);
    }
}

static void parse_passes(char *list)
{
    pass_count = 0;
    for (char *word = strtok(list, ","); word; word = strtok(NULL, ",")) {
        int order = FILL;
        while (order < ORDERS && strncmp(word, order_names[order], strlen(word)) != 0)
            order++;
        if (order == ORDERS || pass_count == MAX_PASSES || (pass_count == 0 && order != FILL)) {
            fprintf(stderr, "hog: --passes: fill first, then any of fill, sequential, random, strided, zipf;"
                            " 64 at most\n");
            exit(2);
        }
        passes[pass_count++] = (enum order)order;
    }
}

static void join_cgroup(const char *folder)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/cgroup.procs", folder);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "0", 1) != 1)
        die(path);
    close(fd);
}

static void parse_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"size", required_argument, NULL, 's'},    {"processes", required_argument, NULL, 'p'},
        {"passes", required_argument, NULL, 'o'},  {"seed", required_argument, NULL, 'e'},
        {"rewrite", required_argument, NULL, 'w'}, {"report", required_argument, NULL, 'r'},
        {"cgroup", required_argument, NULL, 'c'},  {"spoil", required_argument, NULL, 'x'},
        {"until", required_argument, NULL, 'u'},   {"pause", required_argument, NULL, 'm'},
        {"compressible", no_argument, NULL, 'z'},  {0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': size_mib = strtoul(optarg, NULL, 10); break;
        case 'p': processes = atoi(optarg); break;
        case 'o': parse_passes(optarg); break;
        case 'e': seed = strtoull(optarg, NULL, 0); break;
        case 'w': rewrite_percent = (unsigned)atoi(optarg); break;
        case 'c': join_cgroup(optarg); break;
        case 'x': spoiled_page = atol(optarg); break;
        case 'u': until_path = optarg; break;
        case 'm': pause_ms = (unsigned)atoi(optarg); break;
        case 'z': is_compressible = true; break;
        case 'r':
            if ((report_fd = open(optarg, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0)
                die(optarg);
            break;
        default: processes = 0;
        }
    }
    if (optind < argc || processes < 1 || processes > MAX_PROCESSES || size_mib < 1 || pass_count < 1) {
        fprintf(stderr, "usage: hog [--size MIB] [--processes N] [--passes fill,sequential,random,...] [--seed N]\n"
                        "           [--rewrite PERCENT] [--cgroup FOLDER] [--report FILE] [--spoil PAGE]\n"
                        "           [--until FILE] [--pause MS] [--compressible]\n");
        exit(2);
    }
}

// The processes, in their order, and the pipe that starts each one's passes.
static pid_t children[MAX_PROCESSES];
static int go[MAX_PROCESSES];

// Fork the processes; each waits for its first pass, and dies with this one.
static void start_processes(size_t page_count)
{
    pid_t parent = getpid();
    for (int i = 0; i < processes; i++) {
        int ends[2];
        if (pipe(ends) < 0)
            die("pipe");
        children[i] = fork();
        if (children[i] < 0)
            die("fork");
        if (children[i] == 0) {
            close(ends[1]);
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent)
                exit(2);
            work(i, page_count, ends[0]);
        }
        close(ends[0]);
        go[i] = ends[1];
    }
}

// One pass of all processes; how many seconds the slowest took.
static double run_pass(int pass, size_t total_pages, double started_s)
{
    double pass_started_s = now_s(), finished_s = 0;
    for (int i = 0; i < processes; i++) {
        atomic_store(&counters[i].done, 0);
        if (write(go[i], "", 1) != 1)
            die("pipe");
    }
    wait_for_pass(pass, total_pages, started_s);
    for (int i = 0; i < processes; i++) {
        double this_s = atomic_load(&counters[i].finished_s);
        finished_s = this_s > finished_s ? this_s : finished_s;
    }
    return finished_s - pass_started_s;
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    page_words = page_bytes / sizeof(uint64_t);
    size_t counters_bytes = sizeof *counters * (size_t)processes;
    counters = mmap(NULL, counters_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counters == MAP_FAILED)
        die("no memory");
    size_t page_count = size_mib * (1 << 20) / page_bytes / (size_t)processes;
    size_t total_pages = page_count * (size_t)processes;
    start_processes(page_count);
    // The parent goes on reporting while its children wait for memory.
    if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0)
        fprintf(stderr, "hog: not locked: %s\n", strerror(errno));

    char verdict[MAX_PASSES * 64 + 256];
    char times[MAX_PASSES * 64] = "";
    double started_s = now_s();
    bool is_last = false;
    for (int pass = 0; pass < pass_count && !is_last; pass++) {
        if (pass > 0 && pause_ms > 0)
            nanosleep(&(struct timespec){pause_ms / 1000, (long)(pause_ms % 1000) * 1000000}, NULL);
        is_last = pass > 0 && until_path && access(until_path, F_OK) == 0;
        double seconds = run_pass(pass, total_pages, started_s);
        snprintf(times + strlen(times), sizeof times - strlen(times), "%s{\"order\": \"%s\", \"seconds\": %.2f}",
                 pass ? ", " : "", order_names[passes[pass]], seconds);
    }
    unsigned long wrong = sum(offsetof(struct counters, wrong));
    snprintf(verdict, sizeof verdict,
             "{\"event\": \"verdict\", \"complete\": true, \"pages\": %zu, \"checked\": %lu, \"wrong\": %lu, "
             "\"processes\": %d, \"seconds\": %.2f, \"passes\": [%s]}\n",
             total_pages, sum(offsetof(struct counters, checked)), wrong, processes, now_s() - started_s, times);
    say(verdict);
    // Their cgroup can be removed when this process has ended: not before their memory is given back.
    for (int i = 0; i < processes; i++)
        kill(children[i], SIGKILL);
    while (wait(NULL) > 0)
        ;
    return wrong ? 1 : 0;
}
