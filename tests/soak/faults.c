/* Loaded before the C library: a disk that is full after so many bytes, a clock that jumps back.

   SOAK_DISK, SOAK_DISK_BYTES   writes below this folder fail with ENOSPC once so many bytes were written by this process
   SOAK_CLOCK_MS, SOAK_CLOCK_BACK   so many milliseconds after the first look, the date jumps back by so many seconds */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static long long written;

static int is_full(int fd, size_t more) {
    const char *folder = getenv("SOAK_DISK"), *bytes = getenv("SOAK_DISK_BYTES");
    char link[64], path[4096];
    if (!folder || !bytes) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    if (__atomic_add_fetch(&written, (long long)more, __ATOMIC_SEQ_CST) <= atoll(bytes)) return 0;
    errno = ENOSPC;
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t count) {
    REAL(write);
    return is_full(fd, count) ? -1 : real(fd, data, count);
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t place) {
    REAL(pwrite);
    return is_full(fd, count) ? -1 : real(fd, data, count, place);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t place) {
    REAL(pwrite64);
    return is_full(fd, count) ? -1 : real(fd, data, count, place);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    size_t all = 0;
    for (int i = 0; i < count; i++) all += parts[i].iov_len;
    return is_full(fd, all) ? -1 : real(fd, parts, count);
}
ssize_t sendfile(int out, int in, off_t *place, size_t count) {
    REAL(sendfile);
    return is_full(out, count < 1 << 20 ? count : 1 << 20) ? -1 : real(out, in, place, count);
}
ssize_t sendfile64(int out, int in, off64_t *place, size_t count) {
    REAL(sendfile64);
    return is_full(out, count < 1 << 20 ? count : 1 << 20) ? -1 : real(out, in, place, count);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags) {
    REAL(copy_file_range);
    return is_full(out, count < 1 << 20 ? count : 1 << 20) ? -1 : real(in, from, out, to, count, flags);
}

static long long milliseconds(const struct timespec *t) { return t->tv_sec * 1000LL + t->tv_nsec / 1000000; }

static time_t jump(void) {
    static long long first;
    const char *after = getenv("SOAK_CLOCK_MS"), *back = getenv("SOAK_CLOCK_BACK");
    struct timespec now;
    if (!after || !back) return 0;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    if (!first) first = milliseconds(&now);
    return milliseconds(&now) - first < atoll(after) ? 0 : atoll(back);
}

int clock_gettime(clockid_t clock, struct timespec *t) {
    int result = syscall(SYS_clock_gettime, clock, t);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec -= jump();
    return result;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
