//! What the tests of this crate share: helper processes, deadlines, marked children.

use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use matchlock_host::process::{ChildSpec, LinuxProcesses, Processes};
use matchlock_model::id::{InstallId, Mark, VmId};
use matchlock_model::identity::ProcessIdentity;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// Longer than anything here takes on a busy machine; reaching it is a failure.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The variable that tells a helper process what it is.
const ROLE: &str = "MATCHLOCK_TEST_HELPER";

/// The variable with a directory for a helper process.
const DIRECTORY: &str = "MATCHLOCK_TEST_HELPER_DIR";

/// Waits, but not for ever.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// A mark that no other test or session uses.
pub(crate) fn unique_mark() -> Mark {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("random bytes");
    Mark { install: InstallId::from_bytes(bytes), vm: VmId::new(0x0bad_cafe) }
}

/// A child that runs a shell script, with these as further arguments.
pub(crate) fn shell(directory: &Path, script: &str, arguments: &[&str]) -> ChildSpec {
    let log = File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"))
        .expect("the log can be opened");
    ChildSpec {
        program: "/bin/sh".into(),
        args: ["-c", script].iter().chain(arguments).map(Into::into).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        cwd: directory.to_owned(),
        cwd_fd: None,
        log,
        inherit: Vec::new(),
        max_file_bytes: None,
    }
}

/// A child that does nothing until it is killed, and carries a mark.
pub(crate) fn marked_child(directory: &Path, mark: &Mark) -> ChildSpec {
    // The kernel wakes and hangs up a stopped process whose parent has gone.
    let script = "trap '' HUP; while :; do kill -STOP $$; done";
    shell(directory, script, &["-name", &mark.to_string()])
}

/// Waits until exactly this process is gone (a zombie is).
pub(crate) async fn gone(processes: &impl Processes, identity: &ProcessIdentity) {
    soon("the end of a process", async {
        while processes.is_alive(identity).expect("it can be looked at") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A process that should end with its parent: killed when the test ends, in case it did not.
pub(crate) struct Orphan(pub(crate) ProcessIdentity);

impl Drop for Orphan {
    fn drop(&mut self) {
        let alive = LinuxProcesses::new().and_then(|processes| processes.is_alive(&self.0));
        if !alive.unwrap_or(false) {
            return;
        }
        if let Some(pid) = Pid::from_raw(self.0.pid) {
            kill_process(pid, Signal::KILL).expect("an orphan is killed");
        }
    }
}

/// Another process of this test program that runs one of its `#[ignore]`d tests as its main
/// function. Killed when dropped.
pub(crate) struct Helper {
    child: Child,
    // Held open: a helper ends when its stdin does.
    _stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Helper {
    /// Starts it.
    pub(crate) fn start(role: &str, directory: &Path) -> Self {
        let program = std::env::current_exe().expect("our own program");
        let mut child = Command::new(program)
            .args(["--exact", role, "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(DIRECTORY, directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the helper starts");
        let stdin = child.stdin.take().expect("its stdin");
        let lines = BufReader::new(child.stdout.take().expect("its stdout")).lines();
        Self { child, _stdin: stdin, lines }
    }

    /// Waits until it says this, and returns the rest of the line.
    pub(crate) async fn says(&mut self, word: &str) -> String {
        soon("a word of the helper", async {
            while let Some(line) = self.lines.next_line().await.expect("the helper can be heard") {
                // The test harness may have begun the line.
                if let Some((_, rest)) = line.split_once(word) {
                    return rest.trim().to_owned();
                }
            }
            panic!("the helper ended without saying {word:?}");
        })
        .await
    }

    /// SIGKILL, and waits for its end.
    pub(crate) async fn kill(mut self) {
        soon("the end of the helper", self.child.kill()).await.expect("the helper is killed");
    }
}

/// In a helper: its directory, or `None` when somebody runs the ignored tests by hand.
pub(crate) fn helper_directory(role: &str) -> Option<std::path::PathBuf> {
    (std::env::var(ROLE).ok()? == role).then(|| std::env::var_os(DIRECTORY))?.map(Into::into)
}

/// In a helper: waits until the test that started it ends or closes its stdin.
pub(crate) async fn until_stdin_ends() {
    let mut stdin = tokio::io::stdin();
    let mut nothing = tokio::io::sink();
    tokio::io::copy(&mut stdin, &mut nothing).await.expect("stdin can be read");
}
