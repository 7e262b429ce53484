//! The messages of the protocol, see [`crate::PROTOCOL_VERSION`].
//!
//! The first frame of every stream is a [`Request`] from the host. `Hello`, `Configure` and
//! `Shutdown` are answered by one [`Reply`]. `Exec`, `File` and `Attach` turn the stream into a
//! conversation about one job:
//!
//! ```text
//!   host → guest  ExecInput:  Stdin* StdinEof? Signal* Resize* Ack* Release
//!   guest → host  ExecOutput: (Started | Attached | Failed) Output* StdinAck* Exited
//! ```
//!
//! # Flow control and re-attachment
//! Output of a job (stdout and stderr together) has one running byte offset. The guest keeps what
//! is not acknowledged and stops reading the command's pipes at [`JOB_WINDOW_BYTES`], so a slow
//! host blocks the command and loses nothing. Stdin works the same way in the other direction:
//! the host keeps what the guest has not acknowledged and never has more than the window in
//! flight. A job outlives its stream; `Attach` continues it from the given offset, and the
//! guest's `Attached` says from where stdin is to be sent again. `Release` ends a job: running
//! commands of a released job are killed, its buffers freed, its id forgotten.
//!
//! # Terminals
//! A command may have a [`Terminal`] instead of pipes. What it prints is all [`OutputStream::Stdout`]
//! then; stdin are the keys that are typed, and its end is the end-of-file key. A released job's
//! terminal is hung up: SIGHUP first, and what is left half a second later is killed.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// How many unacknowledged bytes a job may hold in each direction.
pub const JOB_WINDOW_BYTES: u64 = 256 * 1024;

/// A job's id: random, chosen by the host, never used twice in one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JobId(pub [u8; 16]);

/// The first frame of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Who are you? Answered by [`Reply::Hello`]; the answer means that the agent is ready.
    Hello,
    /// Set hostname, hosts, DNS, clock and network. Answered by [`Reply::Done`].
    Configure(Configure),
    /// Start a command as a new job. The stream continues with [`ExecInput`] and [`ExecOutput`].
    Exec(ExecStart),
    /// Read, write or list files as a new job. The stream continues as after `Exec`.
    File(FileStart),
    /// Continue a job from another stream. The stream continues as after `Exec`.
    Attach(ExecAttach),
    /// SIGTERM (or what a command asked for) to all commands, grace, SIGKILL, sync, unmount, power off. Answered by
    /// [`Reply::Done`] when it begins; the VM's end is the only other answer.
    Shutdown(Shutdown),
}

/// The answer to a request that is not about a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The answer to [`Request::Hello`].
    Hello(AgentInfo),
    /// It is done (or, for a shutdown, it has begun).
    Done,
    /// It could not be done; one line that says why.
    Failed(String),
}

/// What the agent says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// The agent's version, e.g. `0.1.0`.
    pub agent_version: String,
    /// The guest kernel's release, as `uname -r`.
    pub kernel_release: String,
    /// When `/init` was started, in microseconds since the guest's boot (CLOCK_BOOTTIME).
    pub init_started_us: u64,
    /// When the agent was ready for the link, in microseconds since the guest's boot.
    pub agent_ready_us: u64,
}

/// What a VM is told before its first command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// The hostname, already checked by the host.
    pub hostname: String,
    /// Extra lines of `/etc/hosts`: address and name.
    pub add_hosts: Vec<(String, String)>,
    /// The servers of `/etc/resolv.conf`; empty leaves a file without servers.
    pub dns_servers: Vec<String>,
    /// The host's clock, in nanoseconds since 1970-01-01T00:00:00Z; 0 leaves the guest's clock.
    pub clock_unix_ns: u64,
    /// The CPU share of all commands together, in thousandths of one CPU; 0 means no limit.
    pub cpu_millis: u32,
    /// The network; `None` when the machine has no NIC.
    pub network: Option<Network>,
}

/// How a guest's one NIC is set up. It is `eth0` afterwards, whatever the kernel called it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The hardware address of the NIC that is meant.
    pub mac: [u8; 6],
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The length of the network's prefix, at most 32.
    pub prefix: u8,
    /// Where everything outside the network goes.
    pub gateway: Ipv4Addr,
    /// The gateway's hardware address: it answers no ARP.
    pub gateway_mac: [u8; 6],
    /// The largest packet, in bytes.
    pub mtu: u16,
}

/// How a guest is to be shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// The time between the first signal and SIGKILL, in milliseconds.
    pub grace_ms: u32,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecStart {
    /// The new job's id. An id that was used before is refused.
    pub job: JobId,
    /// The command and its arguments, without a shell in between. Arguments may hold any byte
    /// but NUL.
    pub argv: Vec<Bytes>,
    /// The environment, `(name, value)`, later entries win. The agent adds a default `PATH`, and
    /// `HOME` and `USER` of the user, where they are missing.
    pub env: Vec<(Bytes, Bytes)>,
    /// The working directory, created if missing; `None` means `/`.
    pub cwd: Option<String>,
    /// `uid`, `uid:gid`, `user`, `user:group`; resolved in the guest. `None` means root.
    pub user: Option<String>,
    /// Whether the host sends stdin. Without, it is `/dev/null`, or a terminal where nobody types.
    pub stdin: bool,
    /// A terminal for stdin, stdout and stderr together; `None` means pipes.
    pub terminal: Option<Terminal>,
    /// What its process group gets at a shutdown instead of SIGTERM, 1 to 64. What is its process's
    /// descendant and not of the group gets nothing then: it ends with the command.
    pub stop_signal: Option<u8>,
}

/// The terminal of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its size at the start.
    pub size: TerminalSize,
    /// `TERM`, where the environment does not say it; `None` leaves it to the agent.
    pub term: Option<String>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// The number of lines.
    pub rows: u16,
    /// The number of columns.
    pub cols: u16,
}

/// Bytes that serde encodes as one block.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Bytes(#[serde(with = "serde_bytes")] pub Vec<u8>);

impl From<&str> for Bytes {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

/// Files to be read, written or listed: a job without a command. What is read, and the frames of the
/// [`FileEntry`]s, come as stdout; what is written goes in as stdin. `Started` means that the file
/// is open; a failure after that is a line on stderr and the exit code 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStart {
    /// The new job's id. An id that was used before is refused.
    pub job: JobId,
    /// What to do.
    pub op: FileOp,
}

/// What to do with files, as root, in the namespaces of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileOp {
    /// Read a regular file.
    Read {
        /// Its absolute path.
        path: String,
        /// Where to begin.
        offset: u64,
        /// How much at most; `None` means up to its end.
        length: Option<u64>,
    },
    /// Write a regular file; missing directories are made with mode 0755.
    Write {
        /// Its absolute path.
        path: String,
        /// Where to begin, at most its size; the rest stays. `None` replaces its contents.
        offset: Option<u64>,
        /// The permissions of a file that is made; the lowest nine bits count.
        mode: u32,
    },
    /// List a directory, one level, in no order.
    List {
        /// Its absolute path.
        path: String,
    },
}

/// An entry of a directory. `.` and `..` are not told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name.
    pub name: Bytes,
    /// Its size in bytes.
    pub size: u64,
    /// `st_mode`.
    pub mode: u32,
    /// `st_mtime`.
    pub modified_unix_s: i64,
}

/// A job to continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecAttach {
    /// The job.
    pub job: JobId,
    /// How many bytes of output the host has already; the guest continues after them.
    pub output_offset: u64,
}

/// What the host sends about a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecInput {
    /// Bytes for the command's stdin; `offset` is the number of bytes sent before.
    Stdin {
        /// The position of the first byte.
        offset: u64,
        /// At most [`crate::frame::MAX_CHUNK_BYTES`] bytes.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// No more stdin after this many bytes.
    StdinEof {
        /// The number of bytes sent in all.
        offset: u64,
    },
    /// A signal for the command's process group. SIGHUP is for its terminal's foreground group too.
    Signal(i32),
    /// The terminal has another size now. Without a terminal it breaks the protocol.
    Resize(TerminalSize),
    /// All output before this offset has arrived.
    Ack {
        /// The number of bytes that have arrived.
        offset: u64,
    },
    /// The host is done with this job.
    Release,
}

/// Which of a command's streams the bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What the guest sends about a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecOutput {
    /// The command was executed: `execve` has succeeded.
    Started,
    /// The job is attached.
    Attached {
        /// How many bytes of stdin the guest has taken; the host sends again from there.
        stdin_offset: u64,
    },
    /// The command could not be started, or the job could not be attached. Nothing follows.
    Failed(ExecFailure),
    /// Output of the command.
    Output {
        /// Where it came from.
        stream: OutputStream,
        /// The position of the first byte in the job's output.
        offset: u64,
        /// At most [`crate::frame::MAX_CHUNK_BYTES`] bytes.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Stdin before this offset has been taken (written, or dropped because the command closed
    /// its end).
    StdinAck {
        /// The number of bytes taken.
        offset: u64,
    },
    /// The command has ended and all its output was sent. Sent again after each attach until the
    /// job is released.
    Exited(ExitStatus),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

/// Why a command did not start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecFailure {
    /// What kind of failure.
    pub kind: ExecFailureKind,
    /// One line for the user.
    pub message: String,
}

/// The kinds of [`ExecFailure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecFailureKind {
    /// There is no such file, or it is not in `PATH`.
    NotFound,
    /// The file is there, but it cannot be executed.
    NotExecutable,
    /// The user or group could not be resolved.
    User,
    /// The working directory could not be entered.
    WorkingDirectory,
    /// The request itself is wrong: an empty argv, a NUL byte, a used job id, an unknown job.
    Request,
    /// The guest is out of memory, processes or descriptors, or is shutting down.
    Unavailable,
    /// The file could not be opened.
    File,
}
