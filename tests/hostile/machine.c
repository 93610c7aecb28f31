/* A clock that jumps, and a slow disk: LD_PRELOAD this library.

   MACHINE_SEED draws the jumps of the wall clock, up to a year forward and back, one in about 200
   looks at it. MACHINE_SLOW_MS is how long one in about 50 reads, writes and fsyncs waits. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { YEAR_S = 365 * 24 * 3600, JUMPS = 200, WAITS = 50 };

static _Atomic unsigned long long state;
static _Atomic long long offset_s;

static unsigned draw(void) {
    if (state == 0) {
        const char *seed = getenv("MACHINE_SEED");
        state = 2 * (seed ? strtoull(seed, NULL, 10) : 0) + 1;
    }
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (unsigned)(state >> 33);
}

static long long jumped(void) {
    if (draw() % JUMPS == 0) offset_s = (long long)(draw() % (2 * YEAR_S)) - YEAR_S;
    return offset_s;
}

static void wait_for_disk(void) {
    const char *slow = getenv("MACHINE_SLOW_MS");
    if (slow && draw() % WAITS == 0) usleep(1000 * (unsigned)atoi(slow));
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += jumped();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}

ssize_t read(int file, void *buffer, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    wait_for_disk();
    return real(file, buffer, count);
}

ssize_t write(int file, const void *buffer, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    wait_for_disk();
    return real(file, buffer, count);
}

int fsync(int file) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_for_disk();
    return real(file);
}
