//! `--timings`: how long each step of a `run` took.

use std::time::{Duration, Instant};

use matchlock_model::view::Timings;

use super::render;

/// The steps that the command line itself sees.
#[derive(Debug)]
pub(super) struct Stopwatch {
    started: Instant,
    /// Finding the image, the guest and the hypervisor, and booting the node.
    pub(super) image: Option<Duration>,
    /// From the request to run the command to its end.
    pub(super) exec: Option<Duration>,
    /// From the start of this process until the hypervisor was started.
    pub(super) spawned: Option<Duration>,
    /// When the command ended.
    pub(super) command_ended: Option<Instant>,
}

impl Stopwatch {
    pub(super) fn now() -> Instant {
        Instant::now()
    }

    pub(super) fn start() -> Self {
        let started = Self::now();
        Self { started, image: None, exec: None, spawned: None, command_ended: None }
    }

    pub(super) fn elapsed(&self) -> Duration {
        Self::now() - self.started
    }

    /// Prints the table on stderr. Who has no network is told nothing about one.
    pub(super) fn print(&self, timings: &Timings, has_network: bool) {
        let total = self.elapsed();
        let after_command = self.command_ended.map(|ended| Self::now() - ended);
        let spawned = match timings.restore {
            Some(_) => "started the hypervisor, and in it the guest, from a snapshot",
            None => "started the hypervisor",
        };
        let rows = [
            ("image", self.image, "found the image, booted the node"),
            ("disk", timings.disk, "made directory and disk"),
            ("network", timings.network, "took a subnet, made TAP and firewall tables"),
            ("spawn", timings.spawn, spawned),
            ("restore", timings.restore, "until the guest went on from a snapshot"),
            ("kernel", timings.kernel, "guest kernel, until /init, by the guest's clock"),
            (
                "agent ready",
                timings.agent_ready,
                "from the hypervisor's start to the agent's answer",
            ),
            ("exec", self.exec, "the command"),
            ("stop", timings.stop, "ended the hypervisor"),
            ("clean", timings.clean, "removed what the VM held"),
            ("to spawned", self.spawned, "from our start to the hypervisor started"),
            ("after command", after_command, "from the command's end to ours"),
            ("total", Some(total), ""),
        ];
        let is_part = |name: &str| match name {
            "network" => has_network,
            // It either booted or was restored.
            "restore" => timings.restore.is_some(),
            "kernel" => timings.restore.is_none(),
            _ => true,
        };
        for (name, took, what) in rows.into_iter().filter(|row| is_part(row.0)) {
            let took = took.map_or_else(|| "-".to_owned(), millis);
            render::tell(&format!("{name:<14}{took:>12}  {what}"));
        }
    }
}

fn millis(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}
