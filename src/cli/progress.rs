//! What long work shows of itself while it goes on: one line on a terminal, drawn anew again and
//! again, and gone when the work has ended.
//!
//! ```text
//!  Progress ─ draws ─► Terminal ─► stderr        (only if stderr is a terminal, and without -q)
//!     ▲                              ▲
//!     └── taken away and drawn anew ─┴─ every other word of ours: errors, notes, log lines
//! ```
//!
//! How to use it: make a [`Progress`] where the work begins, tell it of each step, drop it where the
//! work ends and *before* anything of the command's own output is written. Work that is usually done
//! at once goes through [`waiting`], which shows nothing for the first moments.
//!
//! # Invariants
//! 1. Nothing is drawn where stderr is no terminal, or one that cannot move its cursor
//!    (`TERM=dumb`), or with `--quiet`. There [`Elsewhere`] says whether steps are told in lines of
//!    their own; with `--quiet` nothing is.
//! 2. Drawing never waits: what a stopped terminal does not take is not drawn.
//! 3. One line at a time: a `Progress` that begins while another is shown shows nothing.
//! 4. Once it is dropped it never draws again.

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use tokio::sync::watch;

use super::render;
use super::verbosity;
use crate::node::stderr;

/// For how long work that is waited for shows nothing.
const PATIENCE: Duration = Duration::from_millis(400);

/// How often the line is drawn anew while nothing happens: it says that we live.
const TICK: Duration = Duration::from_millis(120);

/// The most drawings in a second.
const HERTZ: u8 = 10;

const UNKNOWN_WIDTH: u16 = 80;

/// The line that is shown, for whoever has to write meanwhile.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn shown() -> MutexGuard<'static, Option<ProgressBar>> {
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is told of steps where nothing can be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elsewhere {
    /// A line for each, on stderr.
    Lines,
    /// Nothing: scripts would be disturbed.
    Nothing,
}

/// Long work that goes on.
#[derive(Debug)]
pub(super) struct Progress {
    /// `None` where nothing is drawn.
    bar: Option<ProgressBar>,
    elsewhere: Elsewhere,
}

impl Progress {
    /// Work of which nobody knows how long it takes.
    pub(super) fn steps(first: &str, elsewhere: Elsewhere) -> Self {
        Self::begin("{spinner} {wide_msg} {elapsed}", None, first, elsewhere)
    }

    /// Work on so many things.
    pub(super) fn counted(what: &str, total: u64, elsewhere: Elsewhere) -> Self {
        let template = "{spinner} {msg} {pos}/{len} [{wide_bar}] {elapsed}";
        Self::begin(template, Some(total), what, elsewhere)
    }

    /// Bytes on their way; how many there will be is not always known.
    pub(super) fn bytes(what: &str, total: Option<u64>, elsewhere: Elsewhere) -> Self {
        let template = match total {
            Some(_) => {
                "{spinner} {msg} {binary_bytes}/{binary_total_bytes} [{wide_bar}] {binary_bytes_per_sec}"
            }
            None => "{spinner} {msg} {binary_bytes} {binary_bytes_per_sec} {elapsed}",
        };
        Self::begin(template, total, what, elsewhere)
    }

    fn begin(template: &str, total: Option<u64>, first: &str, elsewhere: Elsewhere) -> Self {
        let progress = Self { bar: draw(template, total), elsewhere };
        progress.step(first);
        progress
    }

    /// What is done now.
    pub(super) fn step(&self, text: &str) {
        match (&self.bar, self.elsewhere) {
            (Some(bar), _) => bar.set_message(text.to_owned()),
            (None, Elsewhere::Lines) => render::note(text),
            (None, Elsewhere::Nothing) => {}
        }
    }

    /// How much is done, of how much.
    pub(super) fn count(&self, done: u64, of: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(of);
            bar.set_position(done);
        }
    }

    /// What is read from this is what is done.
    pub(super) fn reader<R: io::Read>(&self, inner: R) -> Watched<R> {
        Watched { inner, bar: self.bar.clone() }
    }
}

/// Reads, and shows how much. It may outlive its [`Progress`], and then shows nothing.
#[derive(Debug)]
pub(super) struct Watched<R> {
    inner: R,
    bar: Option<ProgressBar>,
}

impl<R: io::Read> io::Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        if let Some(bar) = self.bar.as_ref().filter(|bar| !bar.is_finished()) {
            bar.inc(read as u64);
        }
        Ok(read)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            // Nobody may make room for it any more before it is gone.
            let mut shown = shown();
            bar.finish_and_clear();
            *shown = None;
        }
    }
}

/// Waits for work, and shows what for if it takes a while. Nothing is told elsewhere.
pub(super) async fn waiting<F: Future>(what: &str, work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        output = &mut work => return output,
        () = tokio::time::sleep(PATIENCE) => {}
    }
    let _shown = Progress::steps(what, Elsewhere::Nothing);
    work.await
}

/// Waits for work on many things, and shows how many are done (of how many) if it takes a while.
/// Nothing is told elsewhere.
pub(super) async fn counting<F: Future>(
    what: &str,
    mut seen: watch::Receiver<(u64, u64)>,
    work: F,
) -> F::Output {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        output = &mut work => return output,
        () = tokio::time::sleep(PATIENCE) => {}
    }
    let shown = Progress::counted(what, 0, Elsewhere::Nothing);
    loop {
        let (done, of) = *seen.borrow_and_update();
        shown.count(done, of);
        tokio::select! {
            biased;
            output = &mut work => return output,
            Ok(()) = seen.changed() => {}
        }
    }
}

/// Whether stderr is a terminal on which a line can be drawn and taken away again.
fn can_draw() -> bool {
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    !verbosity::is_quiet() && io::stderr().is_terminal() && !dumb
}

fn draw(template: &str, total: Option<u64>) -> Option<ProgressBar> {
    if !can_draw() {
        return None;
    }
    let mut shown = shown();
    if shown.is_some() {
        return None;
    }
    // The templates are ours: a test draws each.
    let style = ProgressStyle::with_template(template).ok()?;
    let style = style.progress_chars("=> ").tick_chars("-\\|/ ");
    let target = ProgressDrawTarget::term_like_with_hz(Box::new(Terminal), HERTZ);
    let bar = ProgressBar::with_draw_target(total, target).with_style(style);
    stderr::make_room_with(make_room);
    bar.enable_steady_tick(TICK);
    *shown = Some(bar.clone());
    Some(bar)
}

/// Takes the line away while something else is written.
fn make_room(write: &mut dyn FnMut()) {
    match &*shown() {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// The terminal behind stderr, which may be stopped.
#[derive(Debug)]
struct Terminal;

impl Terminal {
    fn move_cursor(&self, n: usize, direction: char) -> io::Result<()> {
        if n > 0 { self.write_str(&format!("\x1b[{n}{direction}")) } else { Ok(()) }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        terminal_size::terminal_size_of(io::stderr()).map_or(UNKNOWN_WIDTH, |(width, _)| width.0)
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(&format!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        stderr::draw(text);
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.write_str("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nothing_can_be_drawn_nothing_is() {
        // The tests' stderr is no terminal, or this thread's output is caught.
        let progress = Progress { bar: None, elsewhere: Elsewhere::Nothing };
        progress.count(1, 2);
        let mut read = String::new();
        io::Read::read_to_string(&mut progress.reader("seven!".as_bytes()), &mut read).unwrap();
        assert_eq!(read, "seven!");
        assert!(shown().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_waited_for_comes_back() {
        assert_eq!(waiting("a moment", async { 7 }).await, 7);
        let later = async {
            tokio::time::sleep(2 * PATIENCE).await;
            8
        };
        assert_eq!(waiting("longer", later).await, 8);
    }
}
