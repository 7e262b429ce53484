//! What a client sends to a command in flight: its stdin, and its terminal's size.
//!
//! ```text
//!   reader of lines ─► queue in memory, then in a file without a name ─► feeding of the command
//!     never waits        QUEUE_BYTES     what all sessions may hold there
//! ```
//!
//! # Invariants
//! 1. Whoever sends never waits: the lines behind a piece of input are seen at once, whatever the
//!    command does.
//! 2. At most [`QUEUE_BYTES`] wait in memory, and little more than [`PIECE_BYTES`] on their way. What
//!    all commands together have waiting in files is bounded too ([`SPOOL_BYTES`]); when that is used
//!    up, or the disk is full, the command is killed and its request says why. Nothing is lost without
//!    a word.
//! 3. Order is kept: what comes goes to the file as long as anything waits there.
//!
//! # On stop and crash
//! The files have no name: they go with their last descriptor, however the process ends.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use matchlock_host::guest_link::StdinInput;
use matchlock_model::exec::TerminalSize;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::budget::{Budget, Held};

/// How much waits in memory for a command.
pub(super) const QUEUE_BYTES: usize = 256 * 1024;

/// How much may wait in files, for all commands of a process.
pub const SPOOL_BYTES: usize = 4 * 1024 * 1024 * 1024;

/// How much a file holds: it goes when all of it was read.
const FILE_BYTES: u64 = 64 * 1024 * 1024;

/// The longest piece.
const PIECE_BYTES: usize = 64 * 1024;

/// What the smallest piece costs in memory.
const LEAST_COST: usize = 256;

/// Where input waits that does not fit in memory.
#[derive(Debug, Clone)]
pub(super) struct Spool {
    /// A directory on a disk.
    pub(super) directory: PathBuf,
    /// What all files may hold.
    pub(super) budget: Budget,
}

/// Sends input to a command in flight.
#[derive(Debug, Clone)]
pub(super) struct Input {
    shared: Arc<Shared>,
    size: watch::Sender<TerminalSize>,
}

/// The command's end of it.
#[derive(Debug)]
pub(super) struct InputQueue {
    shared: Arc<Shared>,
    /// The size of its terminal, when it changes.
    pub(super) sizes: watch::Receiver<TerminalSize>,
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// Something has come.
    come: Notify,
    /// Cancelled when input was lost; `Waiting::lost` says why.
    failed: CancellationToken,
    spool: Spool,
}

#[derive(Debug, Default)]
struct Waiting {
    pieces: VecDeque<Bytes>,
    /// What the pieces cost.
    cost: usize,
    files: VecDeque<Spooled>,
    end: End,
    lost: Option<String>,
}

/// How far the input has ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// Nothing follows what waits.
    Ended,
    /// Nobody takes any of it.
    Dropped,
}

/// A file with input: written at its end, read from its beginning.
#[derive(Debug)]
struct Spooled {
    file: File,
    written: u64,
    read: u64,
    held: Held,
}

impl Shared {
    // A poisoned lock holds whole pieces.
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Input {
    /// A queue for a command.
    pub(super) fn new(spool: Spool) -> (Self, InputQueue) {
        let (size, sizes) = watch::channel(TerminalSize::default());
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            come: Notify::new(),
            failed: CancellationToken::new(),
            spool,
        });
        (Self { shared: Arc::clone(&shared), size }, InputQueue { shared, sizes })
    }

    /// Sends bytes to the command's stdin. What comes for a command that takes no more is dropped,
    /// as the kernel would.
    pub(super) fn data(&self, data: &[u8]) {
        let mut waiting = self.shared.waiting();
        if waiting.end != End::Open || waiting.lost.is_some() {
            return;
        }
        for piece in data.chunks(PIECE_BYTES) {
            if let Err(why) = waiting.take(piece, &self.shared.spool) {
                waiting.lost = Some(why);
                self.shared.failed.cancel();
                return;
            }
        }
        drop(waiting);
        self.shared.come.notify_one();
    }

    /// Changes the size of the command's terminal; of several at once the last counts.
    pub(super) fn resize(&self, size: TerminalSize) {
        self.size.send_replace(size);
    }

    /// Ends the command's stdin.
    pub(super) fn end(&self) {
        let mut waiting = self.shared.waiting();
        if waiting.end == End::Open {
            waiting.end = End::Ended;
        }
        drop(waiting);
        self.shared.come.notify_one();
    }
}

impl InputQueue {
    /// The next piece, once there is one; `Eof` after the last, once.
    ///
    /// # Errors
    /// When what waits cannot be read.
    pub(super) async fn next(&self) -> io::Result<StdinInput> {
        loop {
            {
                let mut waiting = self.shared.waiting();
                if let Some(piece) = waiting.give()? {
                    return Ok(StdinInput::Data(piece));
                }
                if waiting.end == End::Ended {
                    waiting.end = End::Dropped;
                    return Ok(StdinInput::Eof);
                }
            }
            self.shared.come.notified().await;
        }
    }

    /// Waits until input was lost; why.
    pub(super) async fn lost(&self) -> String {
        self.shared.failed.cancelled().await;
        self.shared.waiting().lost.clone().unwrap_or_default()
    }
}

impl Drop for InputQueue {
    fn drop(&mut self) {
        *self.shared.waiting() = Waiting { end: End::Dropped, ..Waiting::default() };
    }
}

impl Waiting {
    /// Takes a piece that comes; why it cannot.
    fn take(&mut self, piece: &[u8], spool: &Spool) -> Result<(), String> {
        let cost = piece.len().max(LEAST_COST);
        if self.files.is_empty() && self.cost + cost <= QUEUE_BYTES {
            self.cost += cost;
            self.pieces.push_back(Bytes::copy_from_slice(piece));
            return Ok(());
        }
        if self.files.back().is_none_or(|file| file.written >= FILE_BYTES) {
            let file = Spooled::new(spool).map_err(|e| cannot_keep(&spool.directory, &e))?;
            self.files.push_back(file);
        }
        let Some(file) = self.files.back_mut() else { return Ok(()) };
        file.held.take(piece.len()).map_err(|_| too_much())?;
        file.write(piece).map_err(|e| cannot_keep(&spool.directory, &e))
    }

    /// Gives the next piece to the command.
    fn give(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(piece) = self.pieces.pop_front() {
            self.cost -= piece.len().max(LEAST_COST);
            return Ok(Some(piece));
        }
        while let Some(file) = self.files.front_mut() {
            if let Some(piece) = file.read()? {
                return Ok(Some(piece));
            }
            self.files.pop_front();
        }
        Ok(None)
    }
}

impl Spooled {
    fn new(spool: &Spool) -> io::Result<Self> {
        let file = tempfile::tempfile_in(&spool.directory)?;
        Ok(Self { file, written: 0, read: 0, held: spool.budget.hold() })
    }

    fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all(piece)?;
        self.written += piece.len() as u64;
        Ok(())
    }

    /// The next bytes; `None` when all were read.
    fn read(&mut self) -> io::Result<Option<Bytes>> {
        let left = usize::try_from(self.written - self.read).unwrap_or(usize::MAX);
        if left == 0 {
            return Ok(None);
        }
        let mut piece = vec![0; left.min(PIECE_BYTES)];
        self.file.read_exact_at(&mut piece, self.read)?;
        self.read += piece.len() as u64;
        Ok(Some(piece.into()))
    }
}

fn too_much() -> String {
    format!(
        "more than {} GiB of input wait for commands that do not read it; it was killed",
        SPOOL_BYTES >> 30
    )
}

fn cannot_keep(directory: &Path, error: &io::Error) -> String {
    format!(
        "input that waits for the command could not be kept in {}: {error}; it was killed",
        directory.display()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn spool(bytes: usize) -> Spool {
        Spool { directory: std::env::temp_dir(), budget: Budget::new(bytes) }
    }

    fn taken(next: StdinInput) -> Bytes {
        match next {
            StdinInput::Data(data) => data,
            StdinInput::Eof => panic!("the end came early"),
        }
    }

    async fn all(queue: &InputQueue) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match queue.next().await.unwrap() {
                StdinInput::Data(data) => all.extend_from_slice(&data),
                StdinInput::Eof => return all,
            }
        }
    }

    #[tokio::test]
    async fn a_command_that_reads_late_gets_everything_and_the_files_go() {
        let spool = spool(1 << 30);
        let (input, queue) = Input::new(spool.clone());
        // More than one file's worth.
        let length = usize::try_from(FILE_BYTES).unwrap() + 3_000_000;
        let sent: Vec<u8> = (0_u8..251).cycle().take(length).collect();
        for line in sent.chunks(1_000_003) {
            input.data(line);
        }
        assert_eq!(queue.shared.waiting().files.len(), 2);
        input.end();
        input.data(b"after the end");
        assert!(all(&queue).await == sent, "what was sent");
        assert!(queue.shared.waiting().files.is_empty());
        spool.budget.hold().take(1 << 30).unwrap();
    }

    #[tokio::test]
    async fn what_may_not_wait_fails_the_command() {
        let (input, queue) = Input::new(spool(1000));
        input.data(&vec![1; QUEUE_BYTES]);
        input.data(&[1; 1000]);
        assert!(!queue.shared.failed.is_cancelled());
        input.data(b"x");
        assert!(queue.lost().await.contains("4 GiB of input wait"));
        let nowhere = Spool { directory: "/nonexistent".into(), budget: Budget::new(1 << 30) };
        let (input, queue) = Input::new(nowhere);
        input.data(&vec![1; QUEUE_BYTES + 1]);
        assert!(queue.lost().await.contains("/nonexistent"));
    }

    #[tokio::test]
    async fn small_pieces_do_not_cost_more_than_they_count() {
        let (input, queue) = Input::new(spool(1 << 20));
        for _ in 0..=QUEUE_BYTES / LEAST_COST {
            input.data(b"x");
        }
        let waiting = queue.shared.waiting();
        assert_eq!((waiting.pieces.len(), waiting.files.len()), (QUEUE_BYTES / LEAST_COST, 1));
    }

    #[tokio::test]
    async fn nothing_waits_for_a_command_that_has_ended() {
        let spool = spool(1000);
        let (input, queue) = Input::new(spool.clone());
        input.data(&vec![1; QUEUE_BYTES + 10]);
        drop(queue);
        spool.budget.hold().take(1000).unwrap();
        input.data(&vec![1; QUEUE_BYTES + 10]);
        input.end();
        assert!(input.shared.waiting().pieces.is_empty());
        spool.budget.hold().take(1000).unwrap();
    }

    #[tokio::test]
    async fn a_command_that_waits_is_woken() {
        let (input, queue) = Input::new(spool(0));
        let waiting = tokio::spawn(async move { taken(queue.next().await.unwrap()) });
        tokio::time::sleep(Duration::from_millis(5)).await;
        input.data(b"here");
        assert_eq!(waiting.await.unwrap(), "here");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn order_is_kept_however_it_comes_and_goes(
            steps in prop::collection::vec((0_usize..200_000, 0_usize..6), 1..30),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (sent, got) = runtime.block_on(async {
                let (input, queue) = Input::new(spool(1 << 30));
                let (mut sent, mut got) = (Vec::new(), Vec::new());
                for (length, reads) in steps {
                    let from = sent.len();
                    let data: Vec<u8> = (0_u8..253).cycle().skip(from % 253).take(length).collect();
                    input.data(&data);
                    sent.extend(data);
                    for _ in 0..reads {
                        if got.len() < sent.len() {
                            got.extend_from_slice(&taken(queue.next().await.unwrap()));
                        }
                    }
                }
                input.end();
                got.extend(all(&queue).await);
                (sent, got)
            });
            prop_assert!(sent == got);
        }
    }
}
