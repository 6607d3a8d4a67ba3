/* The floor: an NBD server that does no work.
 *
 * One thread, one connection at a time, one read for as many requests as have come in, one writev for all of their
 * replies; the device is plain memory that is never given back, and large WRITEs are received into place. What a
 * client reaches against this is what the client, the socket and the kernel allow a server that waits for them.
 *
 *     floor SOCKET SIZE_BYTES
 */
#include <endian.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

enum { BUFFER = 256 << 10, REPLIES = 500, DIRECT = 64 << 10 };
enum { READ, WRITE, DISC };
enum { OPT_EXPORT_NAME = 1, OPT_ABORT, OPT_LIST, OPT_INFO = 6, OPT_GO, OPT_STRUCTURED };
enum { FLAGS = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 8 }; /* HAS_FLAGS, FLUSH, FUA, CAN_MULTI_CONN */

struct __attribute__((packed)) request {
    uint32_t magic;
    uint16_t flags, command;
    uint64_t cookie, offset;
    uint32_t length;
};
struct __attribute__((packed)) reply { /* a structured one with OFFSET_DATA; its first 16 bytes, a simple one */
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie;
    uint32_t length;
    uint64_t offset;
};

static char *memory, buffer[BUFFER];
static struct reply replies[REPLIES];
static struct iovec vector[2 * REPLIES];
static int count, peer, structured;
static uint64_t size;

static int all(ssize_t (*move)(int, void *, size_t), void *where, size_t length)
{
    for (char *at = where; length;) {
        ssize_t moved = move(peer, at, length);
        if (moved <= 0)
            return -1;
        at += moved;
        length -= moved;
    }
    return 0;
}

static ssize_t put(int fd, void *from, size_t length) { return write(fd, from, length); }
static int receive(void *where, size_t length) { return all(read, where, length); }
static int transmit(void *from, size_t length) { return all(put, from, length); }

static int flush(void)
{
    struct iovec *at = vector, *end = vector + count;
    count = 0;
    while (at < end) {
        ssize_t sent = writev(peer, at, end - at);
        if (sent <= 0)
            return -1;
        for (; at < end && (size_t)sent >= at->iov_len; at++)
            sent -= at->iov_len;
        if (at < end) {
            at->iov_base = (char *)at->iov_base + sent;
            at->iov_len -= sent;
        }
    }
    return 0;
}

static void answer(uint64_t cookie, uint64_t offset, uint32_t data)
{
    struct reply *reply = &replies[count / 2];
    size_t header = 16;
    if (structured && data) {
        *reply = (struct reply){htobe32(0x668e33ef), htobe16(1), htobe16(1), cookie, htobe32(data + 8), offset};
        header = sizeof *reply;
    } else {
        *reply = (struct reply){.magic = htobe32(0x67446698), .cookie = cookie};
    }
    vector[count++] = (struct iovec){reply, header};
    vector[count++] = (struct iovec){memory + be64toh(offset), data};
}

static int option_reply(uint32_t option, uint32_t type, void *body, uint32_t length)
{
    struct __attribute__((packed)) { uint64_t magic; uint32_t option, type, length; } head =
        {htobe64(0x3e889045565a9), htobe32(option), htobe32(type), htobe32(length)};
    return transmit(&head, sizeof head) || transmit(body, length);
}

static int haggle(void)
{
    struct __attribute__((packed)) { uint64_t magic, option; uint16_t flags; } hello =
        {htobe64(0x4e42444d41474943), htobe64(0x49484156454F5054), htobe16(3)};
    struct __attribute__((packed)) { uint64_t magic; uint32_t option, length; } option;
    struct __attribute__((packed)) { uint16_t type; uint64_t size; uint16_t flags; } export =
        {0, htobe64(size), htobe16(FLAGS)};
    uint32_t client;
    structured = 0;
    if (transmit(&hello, sizeof hello) || receive(&client, 4))
        return -1;
    for (;;) {
        if (receive(&option, sizeof option))
            return -1;
        uint32_t number = be32toh(option.option), length = be32toh(option.length);
        if (length > BUFFER || receive(buffer, length))
            return -1;
        if (number == OPT_GO || number == OPT_INFO) {
            if (option_reply(number, 3, &export, sizeof export) || option_reply(number, 1, 0, 0))
                return -1;
            if (number == OPT_GO)
                return 0;
        } else if (number == OPT_STRUCTURED) {
            structured = 1;
            if (option_reply(number, 1, 0, 0))
                return -1;
        } else if (number == OPT_ABORT) {
            return -1;
        } else if (option_reply(number, 1u << 31 | 1, 0, 0)) {
            return -1;
        }
    }
}

static void serve(void)
{
    size_t held = 0;
    for (;;) {
        ssize_t got = read(peer, buffer + held, sizeof buffer - held);
        if (got <= 0)
            return;
        size_t end = held + got, at = 0;
        while (end - at >= sizeof(struct request)) {
            struct request *request = (struct request *)(buffer + at);
            uint32_t length = be32toh(request->length);
            uint16_t command = be16toh(request->command);
            size_t next = at + sizeof *request;
            uint64_t cookie = request->cookie, offset = request->offset;
            char *place = memory + be64toh(offset);
            if (command == DISC || be64toh(offset) > size || length > size - be64toh(offset))
                return;
            if (command == WRITE) {
                size_t here = end - next < length ? end - next : length;
                if (here < length && length < DIRECT)
                    break;
                memcpy(place, buffer + next, here);
                if (here < length && (flush() || receive(place + here, length - here)))
                    return;
                next += here;
            }
            answer(cookie, offset, command == READ ? length : 0);
            at = next;
            if (count == 2 * REPLIES && flush())
                return;
        }
        held = end - at;
        memmove(buffer, buffer + at, held);
        if (flush())
            return;
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), room = 1 << 20;
    if (argc != 3 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    signal(SIGPIPE, SIG_IGN);
    size = strtoull(argv[2], 0, 0);
    memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("memory");
        return 1;
    }
    strcpy(address.sun_path, argv[1]);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
        perror(argv[1]);
        return 1;
    }
    while ((peer = accept(listener, 0, 0)) >= 0) {
        setsockopt(peer, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
        if (!haggle())
            serve();
        close(peer);
    }
    return 1;
}
