/*
 * Lets user-mode Linux 6.1 run on processors whose vector registers take more than it knows of (those with AMX).
 *
 * It sets the registers of its processes with as many bytes as it has room for, where Linux wants all of them or says
 * EFAULT, and process 1 of the guest dies at once. Preloaded, this fills in what is missing with what there is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef long (*ptrace_function)(enum __ptrace_request, pid_t, void *, void *);

long ptrace(enum __ptrace_request request, ...)
{
    static ptrace_function next;
    static char all[64 * 1024];
    struct iovec given, whole = {all, sizeof all};
    va_list arguments;
    pid_t pid;
    void *address, *data;

    va_start(arguments, request);
    pid = va_arg(arguments, pid_t);
    address = va_arg(arguments, void *);
    data = va_arg(arguments, void *);
    va_end(arguments);
    if (!next)
        next = (ptrace_function)dlsym(RTLD_NEXT, "ptrace");
    if (request != PTRACE_SETREGSET || (long)address != NT_X86_XSTATE)
        return next(request, pid, address, data);
    given = *(struct iovec *)data;
    if (next(PTRACE_GETREGSET, pid, address, &whole) < 0)
        return -1;
    if (given.iov_len < whole.iov_len) {
        memcpy(all, given.iov_base, given.iov_len);
        given = whole;
    }
    return next(request, pid, address, &given);
}
