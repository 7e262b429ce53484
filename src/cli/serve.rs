//! `matchlock serve`: sessions over a unix socket, many clients at once.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use matchlock_model::vm::StopMode;
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::render;
use super::rpc::{DEFAULT_STALL_S, host};
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::rpc::Listener;
use crate::node::signals::Interrupts;

/// The arguments of `serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each client speaks as with `matchlock rpc` (docs/RPC.md) and has VMs of its own, which end with its
connection. Only your own processes and root's are served. SIGTERM ends all sessions.

Example:
  matchlock serve --socket /run/user/1000/matchlock.sock")]
pub(super) struct ServeArgs {
    /// Socket to listen on; made with mode 0600, removed at the end
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Seconds after which a client that reads none of its answers counts as gone
    #[arg(long, default_value_t = DEFAULT_STALL_S, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    stall_timeout: u64,
}

pub(super) async fn serve(args: ServeArgs, config: NodeConfig) -> Result<u8, CliError> {
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let node = Node::boot(config.clone()).await?;
    let served = sessions(&node, args, config, &mut interrupts).await;
    let shutdown = node.shutdown(StopMode::Force).await;
    served?;
    shutdown?;
    Ok(0)
}

async fn sessions(
    node: &Node,
    args: ServeArgs,
    config: NodeConfig,
    interrupts: &mut Interrupts,
) -> Result<(), CliError> {
    let listener = Listener::bind(&args.socket).await?;
    render::note(&format!("listening on {}", args.socket.display()));
    let host = Arc::new(host(node, config, args.stall_timeout));
    let stop = CancellationToken::new();
    let mut serving = std::pin::pin!(listener.serve(host, stop.clone()));
    loop {
        tokio::select! {
            served = &mut serving => return Ok(served?),
            _ = interrupts.next() => stop.cancel(),
        }
    }
}
