//! A process of its own for a part of a test: this test program again, with one of its ignored tests.
//!
//! ```text
//! parent                                            child: an #[ignore]d test, the helper
//! Child::start(helper, task) ── environment ──────► task()    None: somebody ran all ignored tests
//! Child::hear()              ◄─ standard output ─── tell()    a line, written at once
//! Child::go()                ── standard input ───► await_go()
//! ```
//!
//! # Invariants
//! * What a child told before it was killed is heard; half a line is nothing.
//! * No child outlives its [`Child`].

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

const TASK: &str = "MATCHLOCK_STORE_TASK";
const MARK: &str = "@@ ";

/// A running child.
pub(crate) struct Child {
    process: std::process::Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Child {
    /// Starts the helper with this full name; the task is any text without a NUL.
    pub(crate) fn start(helper: &str, task: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", helper, "--ignored", "--nocapture", "--test-threads=1"])
            .env(TASK, task)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self { process, input, output }
    }

    /// Lets it go on.
    pub(crate) fn go(&mut self) {
        self.input.write_all(b"go\n").unwrap();
    }

    /// The next thing it tells; `None` when it has ended.
    pub(crate) fn hear(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            let line = line.strip_suffix('\n')?;
            if let Some((_, told)) = line.split_once(MARK) {
                return Some(told.to_owned());
            }
        }
    }

    /// Kills it; what it has told can still be heard.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
    }

    /// Hears it out and waits for its end; whether it ended well.
    pub(crate) fn end(mut self) -> bool {
        while self.hear().is_some() {}
        self.process.wait().unwrap().success()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended already, and a test that panics must not panic again.
        self.process.kill().unwrap_or_default();
        drop(self.process.wait());
    }
}

/// In a child: what it is to do.
pub(crate) fn task() -> Option<String> {
    std::env::var(TASK).ok()
}

/// In a child: tells the parent a line.
pub(crate) fn tell(what: &str) {
    // One write, on a line of its own: the test harness writes to this output too.
    let line = format!("\n{MARK}{what}\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

/// In a child: waits for the parent.
pub(crate) fn await_go() {
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Tells a person who reads the test's output.
pub(crate) fn note(what: &str) {
    println!("{what}");
}

/// Numbers that look random, the same for the same seed (splitmix64).
pub(crate) struct Dice(u64);

impl Dice {
    /// Seeded anew each time, and by `MATCHLOCK_STORE_SEED` to repeat a failure; prints the seed.
    pub(crate) fn new(test: &str) -> Self {
        let seed = match std::env::var("MATCHLOCK_STORE_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => {
                use std::hash::BuildHasher as _;
                std::hash::RandomState::new().hash_one(test)
            }
        };
        note(&format!("{test}: MATCHLOCK_STORE_SEED={seed}"));
        Self::seeded(seed)
    }

    pub(crate) fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below this one.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
