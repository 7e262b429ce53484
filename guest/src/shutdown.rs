//! Ends the guest: its processes, its file systems, the machine.
//!
//! ```text
//!  what each wants, else SIGTERM ─► all gone, or grace ─► SIGKILL to all ─► answer taken
//!                                                    ─► root read-only, layer read-only ─► power off
//! ```
//!
//! # Invariants
//! 1. Every process gets SIGTERM exactly once: the small init of a command does not pass on what
//!    comes from outside its namespace. But a command that wants another signal has got that, and
//!    neither it nor what descends from it gets SIGTERM.
//! 2. The power goes off in bounded time, whatever the commands do.
//!
//! # Failure
//! A file system that cannot be made read-only was synced, and a line on the console says so; the
//! power goes off all the same.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, sync};
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_flag, fspick};

use crate::agent::ShutdownOrder;
use crate::boot::console;
use crate::descent;
use crate::reaper::Reaper;

/// How long killed processes may take to go: the kernel's work only.
const KILLED: Duration = Duration::from_secs(5);

/// Carries out a shutdown. Never returns.
pub async fn run(order: ShutdownOrder, reaper: &Reaper, layer: &OwnedFd) -> ! {
    // Only PID 1 of a guest may signal everybody.
    assert!(getpid() == Pid::from_raw(1), "not the init of a guest");
    if order.told.is_empty() {
        signal_all(Signal::SIGTERM);
    } else {
        signal_others(&order.told);
    }
    // A stopped process could not act on it.
    signal_all(Signal::SIGCONT);
    if tokio::time::timeout(order.grace, reaper.all_gone()).await.is_err() {
        signal_all(Signal::SIGKILL);
        if tokio::time::timeout(KILLED, reaper.all_gone()).await.is_err() {
            console::line(format_args!("some processes survive SIGKILL"));
        }
    }
    // An error means that the stream was dropped, which is as good an end.
    drop(order.answered.await);
    settle_disks(layer);
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    console::fatal(&io::Error::from(errno))
}

fn signal_all(signal: Signal) {
    match kill(Pid::from_raw(-1), signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => console::line(format_args!("cannot send {signal} to all: {errno}")),
    }
}

/// SIGTERM to all but what descends from these. What is forked while they are counted may miss it,
/// and is killed after the grace.
fn signal_others(told: &[rustix::process::Pid]) {
    let parents = match descent::parents() {
        Ok(parents) => parents,
        Err(error) => {
            console::failure("cannot list the processes", &error);
            return signal_all(Signal::SIGTERM);
        }
    };
    let told: Vec<i32> = told.iter().map(|pid| pid.as_raw_pid()).collect();
    for pid in descent::others(&parents, &told) {
        match kill(Pid::from_raw(pid), Signal::SIGTERM) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => console::line(format_args!("cannot send SIGTERM to {pid}: {errno}")),
        }
    }
}

/// Leaves a clean writable layer behind.
fn settle_disks(layer: &OwnedFd) {
    sync();
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(errno) = mount(None::<&str>, "/", None::<&str>, flags, None::<&str>) {
        console::line(format_args!("cannot make the root read-only: {errno}"));
    }
    if let Err(error) = freeze_layer(layer) {
        console::line(format_args!("cannot make the writable layer read-only: {error}"));
    }
    sync();
}

/// The layer is mounted nowhere any more, so it is reached by the descriptor kept of it.
fn freeze_layer(layer: &OwnedFd) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(layer, "", flags)?;
    fsconfig_set_flag(&context, "ro")?;
    Ok(fsconfig_reconfigure(&context)?)
}
