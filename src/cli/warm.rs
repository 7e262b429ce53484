//! `matchlock warm`: make the snapshot from which later VMs start, before any of them makes it itself
//! (`node/warming/`).
//!
//! ```text
//!  warm ─► a VM like any other, of no image ─► on hold ─► saved ─► taken down ─► its record is gone
//! ```
//!
//! # On a crash
//! What it left is a VM of no use and a snapshot of no name; `matchlock gc` removes both.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use matchlock_actors::vm::CreateVm;
use matchlock_host::guest_bundle::GuestBundle;
use matchlock_model::failure::{FailureKind, chain};
use matchlock_model::vm::StopMode;

use super::error::CliError;
use super::{number, progress, render};
use crate::node::boot::Node;
use crate::node::client::{not_cleaned_up, settled};
use crate::node::config::NodeConfig;
use crate::node::signals::Interrupts;
use crate::node::warming::{template, template_spec};

/// The arguments of `warm`.
#[derive(Debug, Args)]
#[command(after_help = "\
`run`, `run -d` and `create` of a session start from it when they ask for as many CPUs and as much
memory, with or without a network as it was made; --cold boots. One whose command takes some seconds makes
it beside that, unless MATCHLOCK_AUTO_WARM=0; `warm` makes it now, and anew where there is one. It is of
no use any more once this host was started anew, or the guest or the hypervisor is another; then they
boot, say so and make another. Nothing of an image is in it, and what two microVMs must not share is made
after the start: random numbers, clock, disks, addresses.

Examples:
  matchlock warm                              for `matchlock run`
  matchlock warm --no-network --memory 1024   for `run` with the same flags")]
pub(super) struct WarmArgs {
    /// CPUs, also fractions, as `run` is given them
    #[arg(long, default_value_t = 1.0, value_parser = number::fraction)]
    cpus: f64,
    /// Memory in MB
    #[arg(long, default_value_t = 512, value_name = "MB", value_parser = number::whole)]
    memory: u64,
    /// No NIC at all: needs no privilege
    #[arg(long)]
    no_network: bool,
    /// Guest kernel, an ELF file with a PVH entry [default: the guest bundle's, or as MATCHLOCK_KERNEL
    /// says]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
}

pub(super) async fn warm(args: WarmArgs, config: NodeConfig) -> Result<u8, CliError> {
    let spec =
        template_spec(args.cpus, args.memory, args.no_network).map_err(
            |failure| match failure.kind {
                FailureKind::Input => CliError::input(failure),
                _ => failure.into(),
            },
        )?;
    let kernel = args.kernel.map(std::path::absolute).transpose();
    let kernel = kernel.map_err(|e| CliError::failure(&e))?.or_else(|| config.kernel.clone());
    let (bundle, guest_lease) =
        GuestBundle::find_leased(&config.cache, kernel).map_err(|e| CliError::failure(&e))?;
    if spec.network.is_some() {
        config.subnet_pool.as_ref().map_err(|e| CliError::failure(e))?;
    }
    let lease = guest_lease.map(Arc::new);
    let create = template(spec, bundle.kernel, bundle.initramfs, lease, true);
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let node = Node::boot(config).await?;
    let made = match node.deps().hypervisor.check() {
        Ok(()) => made(&node, create, &mut interrupts).await,
        Err(error) => Err(CliError::failure(&error)),
    };
    // What was half-made is of no use to anybody, and large.
    if !matches!(made, Ok(0))
        && let Err(error) = node.deps().snapshots.sweep().await
    {
        render::note(&format!("{}; `matchlock gc` tries again", chain(&error)));
    }
    node.shutdown(StopMode::Force).await?;
    let code = made?;
    if code == 0 {
        render::lines(["Warm"])?;
    }
    Ok(code)
}

/// Brings the template up and sees it gone.
async fn made(node: &Node, create: CreateVm, interrupts: &mut Interrupts) -> Result<u8, CliError> {
    let vm = node.client().create_vm(create).await?;
    let view = tokio::select! {
        view = progress::waiting("booting a guest to start from", settled(vm.clone())) => view?,
        which = interrupts.next() => {
            node.client().take_down(vm).await?;
            return Ok(which.exit_code());
        }
    };
    match (&view.cause, not_cleaned_up(&view), view.timings.saved) {
        (_, Some(left), _) => Err(CliError::message(left)),
        (Some(cause), None, _) => Err(CliError::message(cause)),
        (None, None, None) => Err(CliError::message(format_args!(
            "{} was ended by somebody else before it was saved: there is no new snapshot",
            vm.id
        ))),
        (None, None, Some(_)) => Ok(0),
    }
}
