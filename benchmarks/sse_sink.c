/* A streaming completion server as fast as one core allows: the other side of benchmarks/client.py.
 *
 *   sse_sink TTFT_US TPOT_US         listens on a free loopback port, prints it, runs until it is killed
 *
 * POST: answers "max_tokens" events of 304 bytes, HTTP/1.1 chunked, each one in a write of its own and on time
 *       (several in one write only when it is late), then usage, [DONE] and the end of the body.
 * GET:  answers one line for each answer so far: number (first id of the prompt), received, first and last write in
 *       ns of CLOCK_MONOTONIC, events, writes.
 *
 * All streams share one TTFT and one TPOT, so the next event due is always at the head of one of two queues.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { EVENT = 304, VARIANTS = 1000, MAX_FD = 65536, LOG_MAX = 4000000 };
typedef struct stream {
    struct stream *next;
    long due, received, first, last;
    long number, events, emitted, total, sent, end, writes;
    long want, have;               /* bytes of the request body; bytes seen so far */
    int fd, open, blocked, in_head, head_len;
    char head[160000];             /* 20,000 ids of 5 digits, a comma each, and the rest */
} stream;
typedef struct { stream *head, *tail; } queue;
typedef struct { long number, received, first, last, events, writes; } row;

static char body[VARIANTS * EVENT], tail_text[1024];
static const char answer_head[] =
    "HTTP/1.1 200 OK\r\ndate: Mon, 04 Aug 2025 00:00:00 GMT\r\nserver: uvicorn\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static stream *streams[MAX_FD];
static queue first_queue, next_queue;
static row *rows;
static long n_rows, ttft_ns, tpot_ns;
static int poll_fd;

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void push(queue *q, stream *s) {
    s->next = NULL;
    if (q->tail) q->tail->next = s; else q->head = s;
    q->tail = s;
}

static stream *pop(queue *q) {
    stream *s = q->head;
    q->head = s->next;
    if (!q->head) q->tail = NULL;
    return s;
}

static void prepare(void) {
    for (int v = 0; v < VARIANTS; v++) {
        char data[512], *out = body + v * EVENT;
        int n = sprintf(data, "data: {\"id\":\"cmpl-5b1f2c3d4e5f60718293a4b5c6d7e8f9\",\"object\":\"text_completion\","
                        "\"created\":1754265600,\"model\":\"meta-llama/Llama-3.1-405B-Instruct\",\"choices\":"
                        "[{\"index\":0,\"text\":\" word\",\"token_ids\":[%d],\"logprobs\":null,\"finish_reason\":null,"
                        "\"stop_reason\":null", 10000 + v);
        int pad = EVENT - 7 - 12 - n;       /* 7: three hex digits and two CRLF; 12: the text around the padding */
        n += sprintf(data + n, ",\"x\":\"%*s\"}]}\n\n", pad, "");
        int used = sprintf(out, "%03x\r\n", n);
        memcpy(out + used, data, n);
        memcpy(out + used + n, "\r\n", 2);
        if (used + n + 2 != EVENT) { fprintf(stderr, "event has %d bytes\n", used + n + 2); exit(1); }
    }
}

/* Write what is due of a stream: head, events up to `emitted`, and after the last event the tail. */
static void flush(stream *s) {
    long head_len = sizeof answer_head - 1, limit = head_len + s->emitted * EVENT;
    if (s->emitted == s->events) {
        char data[512];
        int n = sprintf(data, "data: {\"id\":\"cmpl-5b1f2c3d4e5f60718293a4b5c6d7e8f9\",\"choices\":[],\"usage\":"
                        "{\"prompt_tokens\":9400,\"total_tokens\":%6ld,\"completion_tokens\":%6ld}}\n\ndata: [DONE]\n\n",
                        9400 + s->events, s->events);
        limit += sprintf(tail_text, "%x\r\n%s\r\n0\r\n\r\n", n, data);
    }
    while (s->sent < limit) {
        struct iovec v[64];
        int n = 0;
        long at = s->sent, end = head_len + s->events * EVENT;
        while (at < limit && n < 64) {
            if (at < head_len) {
                v[n] = (struct iovec){(char *)answer_head + at, head_len - at};
            } else if (at < end) {
                long event = (at - head_len) / EVENT, within = (at - head_len) % EVENT;
                v[n] = (struct iovec){body + event % VARIANTS * EVENT + within, EVENT - within};
            } else {
                v[n] = (struct iovec){tail_text + (at - end), limit - at};
            }
            at += v[n++].iov_len;
        }
        ssize_t wrote = writev(s->fd, v, n);
        if (wrote < 0) {
            int full = errno == EAGAIN;
            if (full != s->blocked) {
                struct epoll_event e = {EPOLLIN | (full ? EPOLLOUT : 0), {.fd = s->fd}};
                epoll_ctl(poll_fd, EPOLL_CTL_MOD, s->fd, &e);
                s->blocked = full;
            }
            return;
        }
        s->writes++;
        s->sent += wrote;
    }
    if (s->blocked) {
        struct epoll_event e = {EPOLLIN, {.fd = s->fd}};
        epoll_ctl(poll_fd, EPOLL_CTL_MOD, s->fd, &e);
        s->blocked = 0;
    }
    if (s->emitted == s->events && s->events) {
        s->last = now_ns();
        if (n_rows < LOG_MAX)
            rows[n_rows++] = (row){s->number, s->received, s->first, s->last, s->events, s->writes};
        s->events = 0;
    }
}

static void emit(stream *s, long now) {
    if (!s->open) {               /* closed while queued */
        streams[s->fd] = streams[s->fd] == s ? NULL : streams[s->fd];
        free(s);
        return;
    }
    if (!s->emitted) s->first = now_ns();
    do {                          /* what is late goes out together */
        s->emitted++;
        s->due += tpot_ns;
    } while (s->emitted < s->events && s->due <= now);
    long more = s->emitted < s->events;
    if (!s->blocked) flush(s);
    if (more) push(&next_queue, s);
}

static void answer_log(stream *s) {
    char *text = malloc(n_rows * 140 + 256), *at = text + 128;
    for (long i = 0; i < n_rows; i++)
        at += sprintf(at, "%ld %ld %ld %ld %ld %ld\n", rows[i].number, rows[i].received, rows[i].first, rows[i].last,
                      rows[i].events, rows[i].writes);
    char head[128];
    int n = sprintf(head, "HTTP/1.1 200 OK\r\nContent-Length: %ld\r\n\r\n", (long)(at - text - 128));
    char *from = text + 128 - n;
    memcpy(from, head, n);
    while (from < at) {
        ssize_t wrote = write(s->fd, from, at - from);
        if (wrote > 0) from += wrote;
        else if (errno != EAGAIN) break;
    }
    free(text);
}

static long number_after(const char *text, const char *key) {
    const char *at = strstr(text, key);
    return at ? strtol(at + strlen(key), NULL, 10) : 0;
}

static void close_stream(stream *s, int queued) {
    epoll_ctl(poll_fd, EPOLL_CTL_DEL, s->fd, NULL);
    close(s->fd);
    s->open = 0;
    streams[s->fd] = NULL;
    if (!queued) free(s);
}

/* A request: its beginning and its end are kept, the 50 kB of ids between them are only counted. */
static void readable(stream *s) {
    static char buffer[1 << 18];
    for (;;) {
        ssize_t got = read(s->fd, buffer, sizeof buffer - 1);
        if (got < 0 && errno == EAGAIN) return;
        if (got <= 0) { close_stream(s, s->events > 0); return; }
        long room = sizeof s->head - 1 - s->head_len, take = got < room ? got : room;
        memcpy(s->head + s->head_len, buffer, take);
        s->head_len += take;
        s->head[s->head_len] = 0;
        s->have += got;
        char *end = strstr(s->head, "\r\n\r\n");
        if (!end) continue;
        if (!strncmp(s->head, "GET", 3)) { answer_log(s); s->head_len = s->have = 0; continue; }
        if (!s->want) {
            char *length = strcasestr(s->head, "content-length:");
            s->want = end + 4 - s->head + (length ? strtol(length + 15, NULL, 10) : 0);
        }
        if (s->have < s->want) continue;
        long tokens = number_after(s->head, "\"max_tokens\":");
        s->number = number_after(s->head, "\"prompt\":[");
        s->received = now_ns();
        s->due = s->received + ttft_ns;
        s->events = tokens > 0 ? tokens : 1;
        s->emitted = s->sent = s->writes = s->head_len = s->have = s->want = 0;
        push(&first_queue, s);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: sse_sink TTFT_US TPOT_US\n"); return 2; }
    ttft_ns = atol(argv[1]) * 1000;
    tpot_ns = atol(argv[2]) * 1000;
    rows = malloc(sizeof(row) * LOG_MAX);
    prepare();
    int one = 1, server = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof where;
    if (bind(server, (struct sockaddr *)&where, size) || listen(server, 4096)) { perror("sse_sink"); return 1; }
    getsockname(server, (struct sockaddr *)&where, &size);
    printf("%d\n", ntohs(where.sin_port));
    fflush(stdout);
    poll_fd = epoll_create1(0);
    struct epoll_event e = {EPOLLIN, {.fd = server}}, got[256];
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, server, &e);
    for (;;) {
        long now = now_ns(), wait = 100000000;
        queue *queues[] = {&first_queue, &next_queue};
        for (int q = 0; q < 2; q++) {
            for (int n = 0; n < 64 && queues[q]->head && queues[q]->head->due <= now; n++) emit(pop(queues[q]), now);
            if (queues[q]->head && queues[q]->head->due - now < wait) wait = queues[q]->head->due - now;
        }
        if (wait < 0) wait = 0;
        struct timespec timeout = {0, wait};
        int n = epoll_pwait2(poll_fd, got, 256, &timeout, NULL);
        for (int i = 0; i < n; i++) {
            int fd = got[i].data.fd;
            if (fd == server) {
                for (;;) {
                    int peer = accept4(server, NULL, NULL, SOCK_NONBLOCK);
                    if (peer < 0) break;
                    setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    stream *s = calloc(1, sizeof *s);
                    s->fd = peer;
                    s->open = 1;
                    streams[peer] = s;
                    struct epoll_event add = {EPOLLIN, {.fd = peer}};
                    epoll_ctl(poll_fd, EPOLL_CTL_ADD, peer, &add);
                }
                continue;
            }
            stream *s = streams[fd];
            if (!s) continue;
            if (got[i].events & EPOLLOUT) flush(s);
            if (got[i].events & ~EPOLLOUT) readable(s);
        }
    }
}
