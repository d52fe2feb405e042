"""The system calls that sandboxed code may make, as a seccomp filter (classic BPF). Standard library only: the sandbox
imports it before anything of this package's.

An allow-list: what is not named fails with EPERM, so a call of a newer kernel is refused until somebody names it.
Source: seccomp(2), linux/seccomp.h, linux/bpf_common.h; numbers from the kernel's tables of x86_64 and of the generic
ABI (aarch64).
"""

import errno
import struct

_COMMON = """
read 0 63|write 1 64|close 3 57|fstat 5 80|lseek 8 62|mmap 9 222|mprotect 10 226|munmap 11 215|brk 12 214
rt_sigaction 13 134|rt_sigprocmask 14 135|rt_sigreturn 15 139|pread64 17 67|pwrite64 18 68|readv 19 65|writev 20 66
sched_yield 24 124|mremap 25 216|madvise 28 233|dup 32 23|nanosleep 35 101|getpid 39 172|sendto 44 206
recvfrom 45 207|shutdown 48 210|exit 60 93|uname 63 160|fcntl 72 25|fsync 74 82|ftruncate 77 46|getcwd 79 17
chdir 80 49|fchdir 81 50|umask 95 166|gettimeofday 96 169|getrusage 98 165|sysinfo 99 179|times 100 153
getuid 102 174|getgid 104 176|geteuid 107 175|getegid 108 177|getppid 110 173|sigaltstack 131 132|gettid 186 178
futex 202 98|sched_getaffinity 204 123|getdents64 217 61|set_tid_address 218 96|clock_gettime 228 113
clock_getres 229 114|clock_nanosleep 230 115|exit_group 231 94|epoll_ctl 233 21|tgkill 234 131|openat 257 56
mkdirat 258 34|newfstatat 262 79|unlinkat 263 35|renameat 264 38|readlinkat 267 78|faccessat 269 48|pselect6 270 72
ppoll 271 73|set_robust_list 273 99|epoll_pwait 281 22|eventfd2 290 19|epoll_create1 291 20|dup3 292 24|pipe2 293 59
renameat2 316 276|getrandom 318 278|statx 332 291|rseq 334 293|faccessat2 439 439
"""
_ONLY_X86 = "2 4 6 7 21 22 23 33 76 82 83 84 87 89 201 232"
"""open stat lstat poll access pipe select dup2 truncate rename mkdir rmdir unlink readlink time epoll_wait"""

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_CLONE, _CLONE3, _IOCTL, _PRLIMIT, _SOCKETPAIR = (56, 220), (435, 435), (16, 29), (302, 261), (53, 199)
_CLONE_THREAD, _AF_UNIX = 0x10000, 1

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _FIRST_ARGUMENT, _THIRD_ARGUMENT = 0, 4, 16, 32


def program(machine: str) -> bytes:
    """The filter's instructions for a machine as `os.uname()` names it. Raises `KeyError` for one without a table.

    Processes are not made (`clone` makes threads only), programs are not run, sockets are pairs only.
    """
    architecture, column = _ARCHITECTURES[machine]
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    for number in allowed(machine):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code += _with(_CLONE[column], _FIRST_ARGUMENT, (_ANY_BIT, _CLONE_THREAD), errno.EPERM)
    code += _with(_SOCKETPAIR[column], _FIRST_ARGUMENT, (_EQUAL, _AF_UNIX), errno.EPERM)
    code += _with(_PRLIMIT[column], _THIRD_ARGUMENT, (_EQUAL, 0), errno.EPERM)
    # What a C library knows how to do without: threads fall back to clone, files to fcntl.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += [(_EQUAL, 0, 1, _IOCTL[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOTTY)]
    code += [(_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def allowed(machine: str) -> list[int]:
    """Numbers of the calls that are allowed whatever their arguments."""
    _, column = _ARCHITECTURES[machine]
    common = [int(entry.split()[1 + column]) for line in _COMMON.split("\n") for entry in line.split("|") if entry]
    return common + ([int(number) for number in _ONLY_X86.split()] if machine == "x86_64" else [])


def _with(number: int, argument: int, test: tuple[int, int], error: int) -> list[tuple[int, int, int, int]]:
    """Allow one call where the low half of an argument passes a test."""
    operation, value = test
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, argument),
        (operation, 0, 1, value),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | error),
    ]
