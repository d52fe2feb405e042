"""The walls of the sandbox, built around the calling process with Linux' own means. Standard library only.

Each function raises `Missing` where the kernel refuses, and the caller then runs nothing: there is no weaker sandbox.
Source: unshare(2), user_namespaces(7), landlock(7), seccomp(2), capset(2), linux/landlock.h.
"""

import ctypes
import os
import resource
import struct

import filters

_libc = ctypes.CDLL(None, use_errno=True)

_NEW_NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
}
_MS_PRIVATE_ALL, _MS_NOSUID_NODEV_NOEXEC = 0x44000, 0x2 | 0x4 | 0x8
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_FILE_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many bits of file rights each version of Landlock knows (linux/landlock.h)."""
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
_WRITE = (1 << 1) | _READ_FILE | _READ_DIRECTORY | (1 << 4) | (1 << 5) | (1 << 7) | (1 << 8) | (1 << 13) | (1 << 14)
"""Write, read, list; remove and make directories and regular files; rename; truncate."""


class Missing(Exception):
    """The kernel lacks, or refuses, what the sandbox needs."""


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def own_namespaces() -> None:
    """Leave the machine's users, mounts, processes (of children), network, IPC and host name."""
    uid, gid = os.geteuid(), os.getegid()
    what = f"namespaces ({', '.join(_NEW_NAMESPACES)})"
    _checked(_libc.unshare(sum(_NEW_NAMESPACES.values())), what)
    for name, text in {"setgroups": "deny", "uid_map": f"65534 {uid} 1", "gid_map": f"65534 {gid} 1"}.items():
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise Missing(f"{what}: /proc/self/{name}: {error.strerror}") from error


def own_folder(folder: str, size: int) -> None:
    """Put an empty file system in memory, of so many bytes, over a folder, for this mount namespace alone; go there."""
    _checked(_libc.mount(None, b"/", None, _MS_PRIVATE_ALL, None), "private mounts")
    options = f"size={size},nr_inodes=1000,mode=0700".encode()
    _checked(_libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID_NODEV_NOEXEC, options), "a tmpfs of its own")
    os.chdir(folder)


def limits(seconds: float, memory: int, file_size: int) -> None:
    """Bound CPU seconds, bytes of address space, of a file and of a stack, and open files; no core dumps."""
    bounds = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, bound in bounds.items():
        hard = resource.getrlimit(which)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(which, (bound, bound))


def no_privileges() -> None:
    """Give up all capabilities, for good, and be no target for a debugger."""
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _checked(_libc.syscall(_CAPSET[_machine()], header, none), "capset")
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def only_files(readable: list[str], writable: str) -> None:
    """Landlock: read below `readable`, read and write below `writable`, run nothing, and see no other file; nor bind
    or connect by TCP (from version 4), nor reach processes outside (from 6)."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    _checked(version, "Landlock")
    files = (1 << _FILE_RIGHTS_BY_ABI.get(version, 16)) - 1
    attributes = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _libc.syscall(_LANDLOCK_CREATE, attributes, size, 0)
    _checked(rules, "Landlock")
    for path in readable:
        if os.path.exists(path):
            _allow(rules, path, (_READ_FILE | _READ_DIRECTORY) & files)
    _allow(rules, writable, _WRITE & files)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock")
    os.close(rules)


def only_calls() -> None:
    """seccomp: the calls of `filters` and no others."""
    try:
        code = filters.program(_machine())
    except KeyError as error:
        raise Missing(f"a table of system calls for {error}") from error
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    _checked(_libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _allow(rules: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= ~_READ_DIRECTORY
    _checked(_libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, handle), 0), f"Landlock on {path}")
    os.close(handle)


def _machine() -> str:
    return os.uname().machine


def _checked(result: int, what: str) -> None:
    if result < 0:
        raise Missing(f"{what}: {os.strerror(ctypes.get_errno())}")
