// What tests load in place of NCCL: ranks are threads, or several of one thread, and elements are in host
// memory. It writes down its calls, returns what it is told to, and waits for no more than a few seconds.
//
// VERSION is what it says of itself; WITHOUT_ALL_REDUCE leaves that symbol out.

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define MOST_RANKS 8
#define MOST_CALLS 16

typedef struct { char bytes[128]; } Id;

// What the ranks of one id share.
typedef struct {
    char id[128];
    int ranks, joined, arrived, round;
    const void *from[MOST_RANKS];
    void *to[MOST_RANKS];
    size_t count[MOST_RANKS];
    int element[MOST_RANKS];
} World;

typedef struct { World *world; int rank, ended, error; } Comm;

typedef struct {
    Comm **joins;
    Id id;
    const void *from;
    void *to;
    size_t count;
    int element, ranks, rank;
    Comm *comm;
} Call;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static World worlds[16];
static Comm comms[64];
static int world_count, comm_count, ids;
static char text[1 << 14];
static struct { char name[32]; int status; } answers[8];
static __thread int depth;
static __thread Call queue[MOST_CALLS];
static __thread int queued;

static void note(const char *line) {
    if (strlen(text) + strlen(line) + 2 < sizeof text) strcat(strcat(text, line), "\n");
}

// Of the tests: what was called so far, and what a function returns from now on.
const char *fake_calls(void) { return text; }

void fake_answer(const char *name, int status) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 8; i++)
        if (!answers[i].name[0] || !strcmp(answers[i].name, name)) {
            strncpy(answers[i].name, name, sizeof answers[i].name - 1);
            answers[i].status = status;
            break;
        }
    pthread_mutex_unlock(&lock);
}

static int answer(const char *name) {
    for (int i = 0; i < 8; i++)
        if (!strcmp(answers[i].name, name)) return answers[i].status;
    return 0;
}

// Waits for a change, with the lock held; whether there was one in time.
static int wait_for_others(void) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 10;
    return pthread_cond_timedwait(&moved, &lock, &until) == 0;
}

static float widen(const void *at, size_t i, int element) {
    uint32_t bits;
    float value;
    if (element == 7) return ((const float *)at)[i];
    uint16_t half = ((const uint16_t *)at)[i];
    if (element == 9) bits = (uint32_t)half << 16;
    else if (!(half & 0x7fff)) bits = (uint32_t)half << 16;
    else bits = (uint32_t)(half & 0x8000) << 16 | (((half & 0x7fffu) << 13) + (112u << 23));
    memcpy(&value, &bits, 4);
    return value;
}

// Of values that the type has.
static void narrow(void *at, size_t i, int element, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (element == 7) ((float *)at)[i] = value;
    else if (element == 9 || !(bits << 1)) ((uint16_t *)at)[i] = bits >> 16;
    else ((uint16_t *)at)[i] = (bits >> 16 & 0x8000) | (((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

static void sum(World *w) {
    int element = w->element[0];
    for (size_t i = 0; i < w->count[0]; i++) {
        float total = 0;
        for (int rank = 0; rank < w->ranks; rank++) total += widen(w->from[rank], i, element);
        for (int rank = 0; rank < w->ranks; rank++) narrow(w->to[rank], i, element, total);
    }
}

// All calls of a group begin before any is waited for.
static int run_queue(void) {
    int status = 0, rounds[MOST_CALLS] = {0};
    for (int i = 0; i < queued; i++) {
        Call *c = &queue[i];
        if (c->joins) {
            World *w = NULL;
            for (int at = 0; at < world_count; at++)
                if (!memcmp(worlds[at].id, c->id.bytes, 128)) w = &worlds[at];
            if (!w) {
                w = &worlds[world_count++];
                memcpy(w->id, c->id.bytes, 128);
                w->ranks = c->ranks;
            }
            if (w->ranks != c->ranks) status = 5;
            Comm *made = &comms[comm_count++];
            made->world = w;
            made->rank = c->rank;
            w->joined++;
            *c->joins = c->comm = made;
        } else {
            World *w = c->comm->world;
            int rank = c->comm->rank;
            w->from[rank] = c->from;
            w->to[rank] = c->to;
            w->count[rank] = c->count;
            w->element[rank] = c->element;
            rounds[i] = w->round;
            if (++w->arrived == w->ranks) {
                for (int at = 1; at < w->ranks; at++)
                    if (w->count[at] != w->count[0] || w->element[at] != w->element[0]) status = 5;
                if (!status) sum(w);
                w->arrived = 0;
                w->round++;
            }
        }
    }
    pthread_cond_broadcast(&moved);
    for (int i = 0; i < queued && !status; i++) {
        World *w = queue[i].comm->world;
        while (queue[i].joins ? w->joined < w->ranks : w->round == rounds[i])
            if (!wait_for_others()) {
                status = 6;
                break;
            }
    }
    queued = 0;
    return status;
}

static int called(const char *line, const char *name) {
    note(line);
    return answer(name);
}

int ncclGetVersion(int *version) {
    *version = VERSION;
    return answer("ncclGetVersion");
}

const char *ncclGetErrorString(int status) {
    return status == 5 ? "invalid usage" : status == 99 ? NULL : "a fake error";
}

int ncclGetUniqueId(Id *id) {
    pthread_mutex_lock(&lock);
    int status = called("ncclGetUniqueId", "ncclGetUniqueId");
    for (int i = 0; i < 128; i++) id->bytes[i] = (char)(ids + i);
    ids++;
    pthread_mutex_unlock(&lock);
    return status;
}

int ncclGroupStart(void) {
    pthread_mutex_lock(&lock);
    int status = called("ncclGroupStart", "ncclGroupStart");
    if (!status) depth++;
    pthread_mutex_unlock(&lock);
    return status;
}

int ncclGroupEnd(void) {
    pthread_mutex_lock(&lock);
    int status = called("ncclGroupEnd", "ncclGroupEnd");
    if (--depth) status = 5;
    if (status) queued = 0;
    else status = run_queue();
    pthread_mutex_unlock(&lock);
    return status;
}

int ncclCommInitRank(Comm **comm, int ranks, Id id, int rank) {
    char line[96];
    snprintf(line, sizeof line, "ncclCommInitRank %d of %d, id %d to %d", rank, ranks, id.bytes[0],
             id.bytes[127]);
    pthread_mutex_lock(&lock);
    int status = depth ? called(line, "ncclCommInitRank") : 5;
    if (!status) queue[queued++] = (Call){.joins = comm, .id = id, .ranks = ranks, .rank = rank};
    pthread_mutex_unlock(&lock);
    return status;
}

int ncclCommGetAsyncError(Comm *comm, int *status) {
    pthread_mutex_lock(&lock);
    *status = answer("fake error of earlier work");
    int asked = comm->ended ? 4 : answer("ncclCommGetAsyncError");
    pthread_mutex_unlock(&lock);
    return asked;
}

static int end(Comm *comm, const char *name) {
    char line[64];
    snprintf(line, sizeof line, "%s %d", name, comm->rank);
    pthread_mutex_lock(&lock);
    int status = called(line, name);
    if (comm->ended++) note("ended twice");
    pthread_mutex_unlock(&lock);
    return status;
}

int ncclCommDestroy(Comm *comm) { return end(comm, "ncclCommDestroy"); }

int ncclCommAbort(Comm *comm) { return end(comm, "ncclCommAbort"); }

#ifndef WITHOUT_ALL_REDUCE
int ncclAllReduce(const void *from, void *to, size_t count, int element, int operation, Comm *comm,
                  void *stream) {
    char line[96];
    snprintf(line, sizeof line, "ncclAllReduce %zu of type %d by %d, rank %d, stream %zu%s", count, element,
             operation, comm->rank, (size_t)stream, from == to ? ", in place" : "");
    pthread_mutex_lock(&lock);
    int status = depth && !operation && (element == 6 || element == 7 || element == 9) ? called(line, "ncclAllReduce") : 4;
    if (!status)
        queue[queued++] =
            (Call){.from = from, .to = to, .count = count, .element = element, .comm = comm};
    pthread_mutex_unlock(&lock);
    return status;
}
#endif
