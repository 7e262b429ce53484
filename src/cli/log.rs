//! `matchlock log`: what a VM's command printed, or another of its logs; followed while the VM lives.

use std::io::{self, Write as _};
use std::time::Duration;

use clap::Args;
use matchlock_host::owner_lock::OwnerLocks;
use matchlock_host::rootfs::VmPaths;
use matchlock_host::vm_log::{LogKind, LogReader, Tail};
use matchlock_model::id::VmId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::CliError;
use super::looking::{Looking, not_there};
use crate::node::config::NodeConfig;
use crate::node::signals::{Interrupt, Interrupts};
use crate::node::wiring;

/// The arguments of `log`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints what the command of `matchlock run` printed, stdout and stderr each in its order (as they
are two pipes, not in their common one); with -t what stood on its terminal; not what `matchlock exec` ran. The log is there until the VM is
removed. It is cut: 30 MB are kept, or as configured.

Exit codes: 0, also when Ctrl-C ends --follow; 1 when there is no such VM, or it cannot be read.")]
pub(super) struct LogArgs {
    /// Print what comes, too, until the VM ends
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last N lines
    #[arg(short = 'n', long, value_name = "N", value_parser = parse_tail, default_value = "all")]
    tail: Tail,
    /// The guest's serial console instead: nothing, unless its kernel complains or somebody writes to it
    #[arg(long, group = "which")]
    console: bool,
    /// What the hypervisor said instead
    #[arg(long, group = "which")]
    hypervisor: bool,
    /// What the owner of a VM in the background said instead
    #[arg(long, group = "which")]
    owner: bool,
    /// VM, as `matchlock list` shows it
    id: VmId,
}

fn parse_tail(text: &str) -> Result<Tail, String> {
    match text {
        "all" => Ok(Tail::All),
        text => text
            .parse()
            .map(Tail::Lines)
            .map_err(|_| "use a whole number of lines, or all".to_owned()),
    }
}

impl LogArgs {
    const fn kind(&self) -> LogKind {
        match (self.console, self.hypervisor, self.owner) {
            (true, _, _) => LogKind::Console,
            (_, true, _) => LogKind::Hypervisor,
            (_, _, true) => LogKind::Owner,
            _ => LogKind::Output,
        }
    }
}

pub(super) async fn log(args: LogArgs, config: NodeConfig) -> Result<u8, CliError> {
    let known = match Looking::begin(&config)? {
        Some(looking) => looking.ids().await?.0.contains(&args.id),
        None => false,
    };
    if !known {
        return Err(not_there(&config, args.id).await);
    }
    let mut interrupts = match args.follow {
        true => Some(Interrupts::install().map_err(|e| CliError::failure(&e))?),
        // Dumping ends with the first signal, as any program's.
        false => None,
    };
    let printing = Printing {
        paths: VmPaths::new(&config.vms_dir(), args.id),
        kind: args.kind(),
        tail: args.tail,
        follow: args.follow.then(|| wiring::owner_locks(&config)).transpose()?,
        id: args.id,
    };
    // On a thread of its own: whoever reads us may have stopped, and a signal still ends us.
    let printing = tokio::task::spawn_blocking(move || printing.print());
    let interrupted = async {
        match &mut interrupts {
            Some(interrupts) => interrupts.next().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        printed = printing => {
            let printed = printed.map_err(|e| CliError::failure(&e))?;
            match printed {
                // Whoever reads us has seen enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
                Err(error) => Err(CliError::message(format_args!(
                    "could not print the log of VM {}: {error}", args.id
                ))),
                Ok(()) => Ok(0),
            }
        }
        // The way to end following.
        which = interrupted => Ok(if which == Interrupt::Interrupt { 0 } else { which.exit_code() }),
    }
}

/// How often is looked whether there is more: nobody tells.
const POLL: Duration = Duration::from_millis(100);

struct Printing {
    paths: VmPaths,
    kind: LogKind,
    tail: Tail,
    /// Who knows whether the VM lives, if it is followed.
    follow: Option<std::sync::Arc<dyn OwnerLocks>>,
    id: VmId,
}

impl Printing {
    fn print(self) -> io::Result<()> {
        // There is nothing to read before its directory is made, or after it was removed.
        let mut reader = None;
        loop {
            // Looked at before the log: what it printed at its end is there by then.
            let lives = match &self.follow {
                Some(locks) => locks.is_held(self.id).map_err(io::Error::other)?,
                None => false,
            };
            if reader.is_none() {
                reader = LogReader::open(&self.paths, self.kind, self.tail)?;
            }
            if let Some(reader) = &mut reader {
                drain(reader)?;
            }
            if !lives {
                return Ok(());
            }
            wait_or_hang_up()?;
        }
    }
}

fn drain(reader: &mut LogReader) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = reader.read(&mut buffer)?;
        if read == 0 {
            return stdout.flush();
        }
        stdout.write_all(buffer.get(..read).unwrap_or_default())?;
    }
}

/// Waits a moment; an error once nobody reads our stdout any more, though nothing is written.
fn wait_or_hang_up() -> io::Result<()> {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(POLL.subsec_nanos()) };
    match poll(&mut fds, Some(&wait)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
        Ok(_) => Err(io::ErrorKind::BrokenPipe.into()),
        Err(errno) => Err(errno.into()),
    }
}
