"""The allow-lists: what may be called, with which arguments, and what ends the process that calls it.

Derived by tracing the worker (``strace -f`` from start to the last answer, over the catalogue's models), what the interpreter and glibc
fall back to on other kernels, and what CUDA's user-space driver is known to call. ``tests/integration/test_confine.py`` runs every
provider that is present under them. Docker's default profile is the floor: nothing is allowed that it refuses to a container without
capabilities, but Landlock's own calls, with which a process can only confine itself.
"""

from typing import Literal

import msgspec

EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
CLONE_NEW_MASK = 0x7E020000
"""Every CLONE_NEW* flag that clone takes: mount, cgroup, uts, ipc, user, pid, network."""
CLONE_THREAD = 0x10000
PROT_EXEC = 0x4
WRITING = 0x1 | 0x2 | 0x40 | 0x200
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC."""
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41


class Rule(msgspec.Struct, frozen=True):
    """A call that is allowed by one of its arguments (the low 32 bits of it); refused with ``errno`` otherwise.

    ``any_of``: it equals one of ``values``. ``no_bits``: it has none of the bits in the first value. ``all_bits``: it has all of them.
    """

    call: str
    argument: int
    check: Literal["any_of", "no_bits", "all_bits"]
    values: tuple[int, ...]
    errno: int = EPERM


class Policy(msgspec.Struct, frozen=True):
    """An allow-list. What stands nowhere is answered with EPERM; what stands in ``kill`` ends the process, and the kernel's log says so."""

    allow: frozenset[str]
    rules: tuple[Rule, ...] = ()
    kill: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset({"clone3", "io_uring_setup"})
    """Answered with ENOSYS: callers have another way. The flags of clone3 lie in memory, where a filter can't see them."""


_FILES = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 open openat openat2 close close_range stat fstat lstat
    newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat lseek getdents getdents64 getcwd chdir fchdir dup dup2
    dup3 fcntl ioctl flock pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait
    epoll_pwait epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4 memfd_create ftruncate
    truncate fallocate fsync fdatasync sync_file_range fadvise64 sendfile copy_file_range unlink unlinkat rename renameat renameat2 mkdir
    mkdirat rmdir chmod fchmod fchmodat umask utime utimes utimensat futimesat
""".split()
_MEMORY = "mmap munmap mprotect mremap madvise msync mincore mlock mlock2 munlock brk membarrier".split()
_THREADS = """
    set_robust_list get_robust_list set_tid_address futex futex_waitv rseq sched_yield sched_getaffinity sched_setaffinity sched_getparam
    sched_getscheduler sched_get_priority_max sched_get_priority_min getpriority getcpu gettid exit exit_group restart_syscall
""".split()
_SIGNALS = """
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack kill tgkill tkill pause alarm
    setitimer getitimer
""".split()
_TIME = """
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times timer_create timer_settime timer_gettime timer_delete
    timer_getoverrun
""".split()
_PROCESSES = """
    fork vfork execve wait4 waitid getpid getppid getpgid getpgrp setpgid getsid setsid getuid geteuid getgid getegid getresuid getresgid
    getgroups setuid setgid setgroups setreuid setregid setresuid setresgid setfsuid setfsgid capget capset prctl arch_prctl getrlimit
    setrlimit prlimit64 getrusage sysinfo uname getrandom ioprio_get
""".split()
_SOCKETS = """
    bind listen accept accept4 connect getsockname getpeername getsockopt setsockopt sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg
    shutdown
""".split()
_CONFINEMENT = ["seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"]

NEVER = frozenset(
    """
    mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr unshare setns ptrace
    process_vm_readv process_vm_writev process_madvise pidfd_getfd kexec_load kexec_file_load init_module finit_module delete_module reboot
    bpf swapon swapoff iopl ioperm settimeofday clock_settime clock_adjtime adjtimex open_by_handle_at name_to_handle_at acct quotactl
    quotactl_fd syslog kcmp lookup_dcookie add_key request_key keyctl vhangup sethostname setdomainname modify_ldt move_pages migrate_pages
    """.split()
)
"""No model server has a use for these: who calls one is not what it was meant to be."""


def _floor(families: tuple[int, ...]) -> Policy:
    return Policy(
        allow=frozenset([*_FILES, *_MEMORY, *_THREADS, *_SIGNALS, *_TIME, *_PROCESSES, *_SOCKETS, *_CONFINEMENT]),
        rules=(
            Rule("clone", 0, "no_bits", (CLONE_NEW_MASK,)),
            Rule("socket", 0, "any_of", families, errno=EAFNOSUPPORT),
            Rule("socketpair", 0, "any_of", (AF_UNIX,), errno=EAFNOSUPPORT),
        ),
        kill=NEVER,
    )


FLOOR = _floor((AF_UNIX,))
"""From the first instruction of a sandbox's program on; a worker narrows it further once it has loaded (SERVING)."""
SERVER_FLOOR = _floor((AF_UNIX, AF_INET, AF_INET6))
"""For a server in an image of its own, and its relay: they speak TCP to each other over a loopback that is theirs alone."""

SERVING = Policy(
    allow=frozenset(
        [
            *(set(_THREADS) - {"sched_setaffinity"}),
            *(set(_MEMORY) - {"mmap", "mprotect"}),
            *_TIME,
            *"""
            read write readv writev close lseek fstat newfstatat stat lstat statx access faccessat faccessat2 readlink
            readlinkat getdents64 fcntl poll ppoll select epoll_ctl epoll_wait epoll_pwait eventfd2 pread64
            rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack tgkill getpid getppid getuid geteuid getgid getegid getrlimit getrusage
            sysinfo uname getrandom accept accept4 getsockname getsockopt sendto sendmsg recvfrom recvmsg shutdown
            """.split(),
        ]
    ),
    rules=(
        Rule("openat", 2, "no_bits", (WRITING,)),
        Rule("open", 1, "no_bits", (WRITING,)),
        Rule("clone", 0, "all_bits", (CLONE_THREAD,)),  # threads, not processes
        Rule("mmap", 2, "no_bits", (PROT_EXEC,)),  # no new code
        Rule("mprotect", 2, "no_bits", (PROT_EXEC,)),
        Rule("prctl", 0, "any_of", (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)),
    ),
    kill=NEVER | frozenset({"execve", "execveat", "fork", "vfork", "connect"}),
)
"""A worker that has loaded: it answers on the socket it has, computes, and reads. No program, no connection, no new code. What it may
read is Landlock's part (edge_agent/worker/lockdown.py)."""
SERVING_GPU = msgspec.structs.replace(
    SERVING,
    allow=SERVING.allow
    | {"ioctl", "mmap", "mprotect", "sched_setaffinity", "eventfd", "pipe2", "timerfd_create", "timerfd_settime"}
    | {"memfd_create", "ftruncate"},
    rules=tuple(rule for rule in SERVING.rules if rule.call not in ("mmap", "mprotect")),
)
"""The same for a GPU provider, whose driver speaks by ioctl and compiles kernels while it runs."""

INSPECTING = Policy(
    allow=frozenset(
        """
        read write close lseek fstat newfstatat munmap mremap madvise brk rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack
        futex exit exit_group getrandom clock_gettime getpid gettid tgkill restart_syscall
        """.split()
    ),
    rules=(Rule("mmap", 2, "no_bits", (PROT_EXEC,)), Rule("mprotect", 2, "no_bits", (PROT_EXEC,))),
    kill=NEVER | frozenset({"execve", "execveat", "fork", "vfork", "clone", "socket", "connect"}),
)
"""A program that looks into one file that is open already, and says what it found on a pipe (coordinator/inspector.py)."""
