//! `matchlock exec`: a further command in a running microVM, from any process of the same user.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use clap::Args;
use matchlock_model::exec::ExecSpec;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::signal;
use matchlock_model::spec::{DEFAULT_GRACE, check_user, check_workdir};
use tokio::time::Instant;

use super::error::CliError;
use super::later::refuse_later;
use super::looking::{migrate, not_running, not_there, status_of};
use super::render;
use super::run::{environment, own_terminal};
use super::vm_life::exit_code;
use crate::node::config::NodeConfig;
use crate::node::owner;
use crate::node::relay::{Ending, Ours, RelayLimits, relay};
use crate::node::signals::Interrupts;

/// The arguments of `exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: as `matchlock run`. Each command has a process list of its own: it does not see the
VM's other commands, but shares their files.

Examples:
  matchlock exec -it vm-0badcafe -- sh
  matchlock exec -i vm-0badcafe -- sh -c 'cat > /tmp/f' < file")]
pub(super) struct ExecArgs {
    #[arg(short = 'd', long, hide = true)]
    detach: bool,
    /// Give the command our stdin
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal; with -i it is ours: keys, Ctrl-C and size go to the guest
    #[arg(short, long)]
    tty: bool,
    /// Set a variable: NAME=VALUE, or NAME for your own value
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory in the guest, made if missing
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User in the guest: uid, uid:gid, name or name:group
    #[arg(short, long)]
    user: Option<String>,
    /// VM, as `matchlock list` shows it
    id: VmId,
    /// Command and its arguments
    #[arg(trailing_var_arg = true, value_name = "COMMAND", required = true)]
    command: Vec<OsString>,
}

pub(super) async fn exec(args: ExecArgs, config: NodeConfig) -> Result<u8, CliError> {
    refuse_later(&[("--detach", args.detach)])?;
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    if let Some(workdir) = &args.workdir {
        check_workdir(workdir).map_err(CliError::input)?;
    }
    if let Some(user) = &args.user {
        check_user(user).map_err(CliError::input)?;
    }
    let env = environment(&[], &args.env)?;
    let terminal = own_terminal(args.interactive, args.tty)?;
    migrate(&config)?;
    require_running(&config, args.id).await?;
    let spec = ExecSpec {
        argv: args.command.into_iter().map(OsStringExt::into_vec).collect(),
        env: env.into_iter().map(|var| (var.name.into_bytes(), var.value)).collect(),
        cwd: args.workdir,
        user: args.user,
        stdin: args.interactive,
        terminal,
        stop_signal: None,
    };
    let ours = Ours { stdin: spec.stdin, terminal: spec.terminal.is_some() };
    let vms_dir = config.vms_dir();
    let session = tokio::select! {
        session = owner::exec(&vms_dir, args.id, spec) => session?,
        // The owner may not answer for good.
        which = interrupts.next() => return Ok(which.exit_code()),
    };
    let again =
        render::on_terminal("waiting for the command to end; Ctrl-C again leaves it at once");
    let limits =
        RelayLimits { timeout: None, grace: DEFAULT_GRACE, stop_signal: signal::TERM, again };
    let relayed = relay(session, ours, limits, &mut interrupts).await;
    if let Ending::Lost(lost) = &relayed.ending
        && let Some(why) = why_lost(&config, args.id).await
    {
        tracing::debug!(%lost, "the guest was lost");
        return Err(CliError::message(format_args!(
            "VM {} ended while the command ran: {why}",
            args.id
        )));
    }
    exit_code(relayed.ending, None)
}

/// How long a VM whose guest was lost may take to say why.
const REASON_LIMIT: Duration = Duration::from_secs(3);
const REASON_POLL: Duration = Duration::from_millis(50);

/// Why a VM ended, if its row says so soon. What keeps us from looking is no reason: the command was
/// lost all the same, and that is said.
async fn why_lost(config: &NodeConfig, id: VmId) -> Option<String> {
    let deadline = Instant::now() + REASON_LIMIT;
    loop {
        match status_of(config, id).await {
            Ok(Some(vm)) if vm.record.phase == Phase::Running && vm.is_owned => {}
            Ok(Some(vm)) if vm.record.last_error.is_empty() => return None,
            Ok(Some(vm)) => return Some(vm.record.last_error),
            Ok(None) => return Some("it was removed".into()),
            Err(error) => {
                tracing::debug!(%error, "why a guest was lost could not be looked at");
                return None;
            }
        }
        if Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(REASON_POLL).await;
    }
}

async fn require_running(config: &NodeConfig, id: VmId) -> Result<(), CliError> {
    match status_of(config, id).await? {
        None => Err(not_there(config, id).await),
        // One that stands still is waited for, and its owner knows whether it is dead.
        Some(vm) if vm.is_owned && vm.record.phase == Phase::Running => Ok(()),
        Some(vm) => Err(not_running(id, vm.status)),
    }
}
