//! `matchlock rpc`: a session over stdin and stdout, for programs.

use std::time::Duration;

use clap::Args;
use matchlock_model::vm::StopMode;
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::rpc::{BUDGET_BYTES, Budget, RpcHost, SPOOL_BYTES, SessionEnd, Why, serve};
use crate::node::signals::Interrupts;

/// How long a client may take nothing of what is written to it.
pub(super) const DEFAULT_STALL_S: u64 = 60;

/// The arguments of `rpc`.
#[derive(Debug, Args)]
#[command(after_help = "\
One JSON-RPC 2.0 request per line on stdin, one answer or notification per line on stdout: see
docs/RPC.md. Its VMs end with it: on `close`, at the end of stdin, by SIGTERM.

Example (the end of stdin cancels what is not answered yet):
  (echo '{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"list\"}'; sleep 1) | matchlock rpc")]
pub(super) struct RpcArgs {
    /// Seconds after which a client that reads none of its answers counts as gone
    #[arg(long, default_value_t = DEFAULT_STALL_S, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    stall_timeout: u64,
}

pub(super) async fn rpc(args: RpcArgs, config: NodeConfig) -> Result<u8, CliError> {
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let node = Node::boot(config.clone()).await?;
    let host = std::sync::Arc::new(host(&node, config, args.stall_timeout));
    let stop = CancellationToken::new();
    let session = serve(host, tokio::io::stdin(), tokio::io::stdout(), &stop);
    let mut session = std::pin::pin!(session);
    let end = loop {
        tokio::select! {
            end = &mut session => break end,
            _ = interrupts.next() => stop.cancel(),
        }
    };
    let shutdown = node.shutdown(StopMode::Force).await;
    let code = exit_code(&end);
    shutdown?;
    Ok(code)
}

/// What sessions on this node have in common.
pub(super) fn host(node: &Node, config: NodeConfig, stall_timeout: u64) -> RpcHost {
    RpcHost {
        client: node.client().clone(),
        warming: node.warming().clone(),
        deps: node.deps().clone(),
        vm_log: config.vm_log,
        config,
        budget: Budget::new(BUDGET_BYTES),
        spool: Budget::new(SPOOL_BYTES),
        stalled: Duration::from_secs(stall_timeout),
    }
}

/// Says how a session ended, if not as it should; its exit code.
pub(super) fn exit_code(end: &SessionEnd) -> u8 {
    for line in &end.left {
        render::note(line);
    }
    if let Why::Lost(why) = &end.why {
        render::note(&format!("the session ended: {why}"));
    }
    let is_well = end.left.is_empty() && !matches!(end.why, Why::Lost(_));
    u8::from(!is_well)
}
