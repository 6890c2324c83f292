"""Confine this process for good, by system calls of Linux. Runs inside the sandboxed process, before any code of an
answer, and imports nothing but the standard library.

`enter_namespaces` builds a file system, a network and a process table of its own. `restrict_files` (Landlock) needs no
namespace: it restricts files, and `install_seccomp_filter` then has to refuse what Landlock does not cover. Each
function raises OSError if the kernel refuses a step, so that a process is never confined by half.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NOBODY = 65534
SCRATCH = "/tmp"
"""The program's working directory in a file system of its own."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x80
ALL_NAMESPACES = (
    CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET
    | CLONE_NEWTIME
)
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machines that the filter of system calls knows, by the value of `AUDIT_ARCH` in linux/audit.h."""
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPSET = {"x86_64": 126, "aarch64": 91}
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
EPERM = 1
ENOSYS = 38

# Numbers of system calls: on x86_64 and on aarch64; None if the machine has no such call.
Numbers = Mapping[str, tuple[int | None, int | None]]
ALWAYS_REFUSED: Numbers = {
    # Other processes' memory, and descriptors of theirs.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    # Mounts and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    # Doors into the kernel that no test of an answer needs. io_uring opens sockets past a filter.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # Files in memory, which no limit of a process counts.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
}
REFUSED_WITHOUT_NAMESPACES: Numbers = {
    "socket": (41, 198),
    # Signals to processes of the same user, and sessions, in which a child would outlive its program.
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    # Priorities and processors of processes of the same user.
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Memory and queues that processes share by a key or a name.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # What Landlock lets pass on any file: modes, owners, attributes, times; cutting files, before its third version.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),
}
CLONE = (56, 220)
CLONE3 = (435, 435)
PRLIMIT64 = (302, 261)
OPEN = (2, None)
OPENAT = (257, 56)
OPENAT2 = (437, 437)
FCNTL = (72, 25)
F_SETOWN = 8
F_SETSIG = 10
F_SETOWN_EX = 15
"""Commands of fcntl by which a descriptor sends signals to another process."""
O_ACCMODE = os.O_ACCMODE
O_TRUNC = os.O_TRUNC

READ_FILE = 1 << 2
READ_DIR = 1 << 3
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
TRUNCATE = 1 << 14
REFER = 1 << 13
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
FILE_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights over files that a version of Landlock knows, by the first version that knows them."""
NET_RIGHTS = 0b11
SCOPES = 0b11
"""Binding and connecting TCP, since version 4; abstract sockets and signals, since version 6."""

libc = ctypes.CDLL(None, use_errno=True)


def raise_on_failure(result: int, step: str) -> int:
    """Return `result`, that of a call of libc, or raise OSError with `step` in its message if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")
    return result


class Channel(NamedTuple):
    """The file descriptors by which a confined process exchanges data with its parent.

    Attributes:
        reading: it reads its input here.
        writing: it writes its output here.
    """

    reading: int
    writing: int


def isolate_process(settings: Mapping[str, Any]) -> Channel:
    """Confine this process, redirect its standard streams to `/dev/null`, and return descriptors of the old ones.

    The program knows no name of these descriptors.

    Args:
        settings: see `confine_process`.
    """
    channel = Channel(os.dup(0), os.dup(1))
    for standard in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), standard)
    confine_process(settings)
    return channel


def confine_process(settings: Mapping[str, Any]) -> None:
    """Confine this process and its children for good, by the kind of sandbox and the resource limits in `settings`.

    Args:
        settings: `tier`; `visible`, the paths that may be read; `drop`, whether root becomes the user 65534; `limits`,
            values by the names of Python's `resource`.
    """
    tier = settings["tier"]
    if tier == "namespaces":
        enter_namespaces(settings["visible"], settings["drop"], settings["scratch_bytes"])
    elif settings["drop"]:
        os.chmod(os.getcwd(), 0o1777)  # the program's own folder, made by root
        switch_to_nobody()
    if tier == "landlock":
        restrict_files(settings["visible"], os.getcwd())
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if tier != "unsafe":
        drop_capabilities()
        set_parent_death_signal()
        install_seccomp_filter(without_namespaces=tier == "landlock")


def switch_to_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def set_parent_death_signal() -> None:
    """Make the kernel kill this process when its parent ends. A change of user or of capabilities undoes this."""
    raise_on_failure(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def enter_namespaces(visible: Sequence[str], drops_root: bool, scratch_bytes: int) -> None:
    """Continue in a forked process in new Linux namespaces, without network and with only the visible paths.

    The process that calls this only waits from here on, and exits with the program's status. The first process of the
    namespaces reaps the children that the program leaves. Root that drops its rights needs
    no user namespace for the mounts. Afterwards a second user namespace is entered: the mounts belong to the first, so
    that no process in the second can change them.
    """
    uid = os.geteuid()
    gid = os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if drops_root:
        raise_on_failure(libc.unshare(flags), "unshare")
    else:
        raise_on_failure(libc.unshare(flags | CLONE_NEWUSER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if first := os.fork():
        set_parent_death_signal()
        wait_and_exit_with_status_of(first)
    enter_own_file_system(visible, scratch_bytes)
    if drops_root:
        switch_to_nobody()
    raise_on_failure(libc.unshare(CLONE_NEWUSER), "unshare the second user namespace")
    drop_capabilities()
    set_parent_death_signal()
    if program := os.fork():
        wait_and_exit_with_status_of(program)
    set_parent_death_signal()


def wait_and_exit_with_status_of(child: int) -> None:
    """Wait until a child process ends, reaping all others, and exit this process with the same status."""
    while True:
        finished_child, status = os.wait()
        if finished_child == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def enter_own_file_system(visible: Sequence[str], scratch_bytes: int) -> None:
    """Replace this process's root by a file system in memory with the visible paths, read-only, and an empty `/tmp`.

    The new root is mounted on the working directory. Nothing else of the machine's files can be reached from it.
    """
    root = os.getcwd()
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in [*visible, *DEVICES]:
        bind_path(path, root + path, read_only=path not in DEVICES)
    os.makedirs(root + SCRATCH, exist_ok=True)
    mount("tmpfs", root + SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_bytes},mode=1777")
    os.chdir(root)
    raise_on_failure(libc.syscall(PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    raise_on_failure(libc.umount2(b".", MNT_DETACH), "umount2")
    set_mount_attributes("/", MOUNT_ATTR_RDONLY, 0)
    os.chdir(SCRATCH)


def bind_path(path: str, target: str, read_only: bool) -> None:
    """Bind-mount a file or folder at a target, which is created. A symbolic link is copied instead.

    A path that is missing is left out.
    """
    if os.path.islink(path) and not os.path.lexists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if not os.path.exists(path) or os.path.islink(target):
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(path, target, None, MS_BIND | MS_REC)
    if read_only:
        set_mount_attributes(target, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, AT_RECURSIVE)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    raise_on_failure(libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def set_mount_attributes(target: str, attributes: int, flags: int) -> None:
    value = struct.pack("=QQQQ", attributes, 0, 0, 0)
    raise_on_failure(
        libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), ctypes.c_uint(flags), value, ctypes.c_size_t(32)),
        f"mount_setattr {target}",
    )


def drop_capabilities() -> None:
    """Drop all Linux capabilities of this process for good, also any that executing a file could bring."""
    raise_on_failure(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails past the last one, and without the right to drop
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    raise_on_failure(libc.syscall(CAPSET[platform.machine()], header, bytes(24)), "capset")


def get_landlock_version() -> int:
    """Return the version of Landlock, Linux's access control for files, in this kernel, or 0 if it has none."""
    return max(0, libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def restrict_files(visible: Sequence[str], scratch: str, version: int | None = None) -> None:
    """Restrict this process by Landlock to reading the visible paths and writing below the scratch folder.

    Args:
        version: of Landlock; by default the kernel's.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = version or get_landlock_version()
    if not version:
        raise OSError(ENOSYS, "this kernel has no Landlock")
    handled = FILE_RIGHTS_BY_ABI[max(first for first in FILE_RIGHTS_BY_ABI if first <= version)]
    attributes = struct.pack("=QQQ", handled, NET_RIGHTS, SCOPES)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = raise_on_failure(
        libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)),
        "landlock_create_ruleset",
    )
    reading = READ_FILE | READ_DIR | EXECUTE
    rules = [*((path, reading) for path in visible), (scratch, handled)]
    rules += [(path, READ_FILE | WRITE_FILE) for path in DEVICES]
    for path, rights in rules:
        if os.path.exists(path):
            add_landlock_rule(ruleset, path, handled & (rights if os.path.isdir(path) else rights & FILE_RIGHTS))
    raise_on_failure(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    raise_on_failure(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(ruleset)


def add_landlock_rule(ruleset: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, folder)
    raise_on_failure(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, ctypes.c_uint(0)), f"landlock_add_rule {path}")
    os.close(folder)


def install_seccomp_filter(without_namespaces: bool) -> None:
    """Install a seccomp filter that refuses dangerous system calls to this process and its children, for good.

    Args:
        without_namespaces: whether to refuse also the calls from which namespaces would protect.
    """
    code = b"".join(build_seccomp_program(platform.machine(), without_namespaces))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    raise_on_failure(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "seccomp")


def build_seccomp_program(machine: str, without_namespaces: bool) -> list[bytes]:
    """Return the classic BPF instructions of the seccomp filter for a machine, or raise OSError for an unknown one.

    A refused call fails with EPERM. Calls whose flags lie in memory (clone3, openat2), where a filter cannot read them,
    do not exist: libraries then take their older forms.
    """
    if machine not in ARCHITECTURES or sys.platform != "linux" or sys.maxsize < 2**32:
        raise OSError(ENOSYS, f"no filter of system calls is known for {machine}")
    column = list(ARCHITECTURES).index(machine)
    load_number = load_word(0)
    refuse = return_value(0x50000 | EPERM)
    absent = return_value(0x50000 | ENOSYS)
    code = [load_word(4), jump(0x15, ARCHITECTURES[machine], 1, 0), return_value(0x80000000), load_number]
    if machine == "x86_64":
        code += [jump(0x35, 0x40000000, 0, 1), absent]  # the calls of x32 have numbers of their own

    def refuse_call(number: int | None, *conditions: bytes, answer: bytes = refuse) -> None:
        """Append the refusal of a system call to `code`, or nothing if `number` is `None`.

        Args:
            number: of the system call on this machine.
            conditions: instructions that jump over the refusal; the call's number is loaded again behind it.
            answer: the instruction that refuses.
        """
        if number is not None:
            body = [*conditions, answer] + ([load_number] if conditions else [])
            code.extend([jump(0x15, number, 0, len(body)), *body])

    names = {**ALWAYS_REFUSED, **(REFUSED_WITHOUT_NAMESPACES if without_namespaces else {})}
    for numbers in names.values():
        refuse_call(numbers[column])
    refuse_call(CLONE[column], load_argument(0), jump(0x45, ALL_NAMESPACES, 0, 1))
    refuse_call(CLONE3[column], answer=absent)
    if without_namespaces:
        refuse_call(OPENAT2[column], answer=absent)
        refuse_call(PRLIMIT64[column], load_argument(0), jump(0x15, 0, 1, 0))
        for command in (F_SETOWN, F_SETSIG, F_SETOWN_EX):
            refuse_call(FCNTL[column], load_argument(1), jump(0x15, command, 0, 1))
        for number, flags in ((OPEN[column], 1), (OPENAT[column], 2)):
            # Cutting a file that is opened for reading alone, which Landlock sees from its third version on.
            is_cut_for_reading = jump(0x15, O_TRUNC | os.O_RDONLY, 0, 1)
            refuse_call(number, load_argument(flags), and_accumulator(O_TRUNC | O_ACCMODE), is_cut_for_reading)
    return [*code, return_value(0x7FFF0000)]


def load_word(offset: int) -> bytes:
    """Return the BPF instruction that loads 32 bits of `struct seccomp_data` at an offset in bytes."""
    return struct.pack("=HBBI", 0x20, 0, 0, offset)


def load_argument(index: int) -> bytes:
    """Return the BPF instruction that loads the low 32 bits of the system call's argument at an index."""
    return load_word(16 + 8 * index)


def jump(operation: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def and_accumulator(value: int) -> bytes:
    return struct.pack("=HBBI", 0x54, 0, 0, value)


def return_value(value: int) -> bytes:
    return struct.pack("=HBBI", 0x06, 0, 0, value)
