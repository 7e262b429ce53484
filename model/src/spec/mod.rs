//! What a VM is asked to be. Every refusal of a user's input ends here.
//!
//! [`VmSpecInput`] is what the command line (later also a session) was given, as it was given;
//! [`VmSpec`] is the same, checked. What depends on the image (entrypoint, environment, user)
//! is joined in by [`VmSpec::command`], once the image is known.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::exec::{ExecSpec, Terminal};
use crate::guest::{GuestConfig, GuestNetwork, HostEntry};
use crate::id::VmId;
use crate::image::ImageConfig;
use crate::signal;
use crate::subnet::Subnet;

mod check;
mod network;

use check::{check_cpus, check_hostname, check_image, check_length, check_range, parse_add_host};
pub use check::{check_user, check_workdir};
pub use network::{NetworkInput, NetworkSpec};

/// The smallest guest memory: below it the kernel does not reach its agent.
pub const MIN_MEMORY_MB: u64 = 96;
/// The largest guest memory that is not a typing error.
pub const MAX_MEMORY_MB: u64 = 16 * 1024 * 1024;
/// The smallest writable disk: an ext4 needs some room for itself.
pub const MIN_DISK_SIZE_MB: u64 = 16;
/// The largest writable disk: ext4's limit with 4 KiB blocks, in MiB.
pub const MAX_DISK_SIZE_MB: u64 = 16 * 1024 * 1024;
/// The longest command line with its environment: what one frame of the guest link carries.
pub const MAX_COMMAND_BYTES: usize = 1024 * 1024;
/// The longest hostname that Linux takes.
pub const MAX_HOSTNAME_BYTES: usize = 63;
/// The most `--add-host` entries.
pub const MAX_ADD_HOSTS: usize = 1024;
/// The time a stop gives the guest when nothing else is said.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// A variable of the environment, as given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvVar {
    /// The name.
    pub name: String,
    /// The value.
    pub value: Vec<u8>,
    /// Whether the value was taken from the caller's environment (`-e NAME`): then it counts as a
    /// secret and is never stored.
    pub secret: bool,
}

/// What a VM was asked to be, unchecked.
#[derive(Debug, Clone, PartialEq)]
pub struct VmSpecInput {
    /// The image's tag.
    pub image: String,
    /// The command after the image; empty means the image's own.
    pub command: Vec<Vec<u8>>,
    /// `--entrypoint`; `Some("")` clears the image's.
    pub entrypoint: Option<String>,
    /// The environment, files first.
    pub env: Vec<EnvVar>,
    /// `--workdir`.
    pub workdir: Option<String>,
    /// `--user`.
    pub user: Option<String>,
    /// `--hostname`.
    pub hostname: Option<String>,
    /// `--add-host`, each `host:ip`.
    pub add_hosts: Vec<String>,
    /// Its network.
    pub network: NetworkInput,
    /// `--cpus`.
    pub cpus: f64,
    /// `--memory` in MiB.
    pub memory_mb: u64,
    /// `--disk-size` in MiB.
    pub disk_size_mb: u64,
    /// `--timeout`.
    pub timeout: Option<Duration>,
    /// `--graceful-shutdown`.
    pub graceful_shutdown: Option<Duration>,
    /// `--interactive`.
    pub stdin: bool,
    /// `--tty`: the terminal to give the command.
    pub terminal: Option<Terminal>,
    /// `--privileged`.
    pub privileged: bool,
    /// `--rm`.
    pub remove: bool,
    /// How many CPUs this host has.
    pub host_cpus: u32,
}

/// Why an input was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SpecError {
    /// A number is out of its range.
    #[error("{flag} {given}: expected {expected}")]
    Range {
        /// The flag.
        flag: &'static str,
        /// What was given.
        given: String,
        /// What is allowed.
        expected: String,
    },
    /// A text has the wrong form.
    #[error("{what} {given:?}: {expected}")]
    Form {
        /// What it is.
        what: &'static str,
        /// What was given.
        given: String,
        /// What is wrong with it.
        expected: &'static str,
    },
    /// Two flags contradict each other.
    #[error("{flag} cannot be combined with {with}")]
    Combination {
        /// One.
        flag: &'static str,
        /// The other.
        with: &'static str,
    },
    /// There is nothing to run.
    #[error("command required: {why}, put one after `--`")]
    NoCommand {
        /// What gave none.
        why: String,
    },
    /// The command line and its environment are too long.
    #[error(
        "the command line and its environment take {bytes} bytes, over the limit of {MAX_COMMAND_BYTES}"
    )]
    CommandTooLong {
        /// How long they are.
        bytes: usize,
    },
}

/// A CPU share in thousandths of one CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuMillis(pub u32);

/// What a VM is asked to be, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// The image's tag.
    pub image: String,
    command: Vec<Vec<u8>>,
    entrypoint: Option<String>,
    env: Vec<EnvVar>,
    workdir: Option<String>,
    user: Option<String>,
    hostname: Option<String>,
    add_hosts: Vec<HostEntry>,
    /// Its network; `None` means no NIC at all.
    pub network: Option<NetworkSpec>,
    /// The share of CPU that the guest's commands get.
    pub cpus: CpuMillis,
    /// The guest's memory in MiB.
    pub memory_mb: u64,
    /// The writable disk in MiB.
    pub disk_size_mb: u64,
    /// How long the command may take.
    pub timeout: Option<Duration>,
    /// How long a stop waits for the guest.
    pub grace: Duration,
    /// Whether the command gets a stdin.
    pub stdin: bool,
    /// The terminal that the command gets.
    terminal: Option<Terminal>,
    /// Whether the guest's commands are to be left all of root's rights. Nothing takes them yet.
    privileged: bool,
    /// Whether the VM is removed when its command has ended.
    pub ephemeral: bool,
}

impl VmSpec {
    /// Checks an input.
    ///
    /// # Errors
    /// The first thing that is wrong: which flag, what was given, what is allowed.
    pub fn check(input: VmSpecInput) -> Result<Self, SpecError> {
        check_image(&input.image)?;
        let cpus = check_cpus(input.cpus, input.host_cpus)?;
        check_range("--memory", input.memory_mb, MIN_MEMORY_MB, MAX_MEMORY_MB, "MB")?;
        check_range("--disk-size", input.disk_size_mb, MIN_DISK_SIZE_MB, MAX_DISK_SIZE_MB, "MB")?;
        if input.timeout.is_some_and(|limit| limit.is_zero()) {
            return Err(SpecError::Range {
                flag: "--timeout",
                given: "0".into(),
                expected: "more than that; leave it out for no limit".into(),
            });
        }
        if let Some(hostname) = &input.hostname {
            check_hostname(hostname)?;
        }
        if let Some(workdir) = &input.workdir {
            check_workdir(workdir)?;
        }
        if let Some(user) = &input.user {
            check_user(user)?;
        }
        if input.add_hosts.len() > MAX_ADD_HOSTS {
            return Err(SpecError::Range {
                flag: "--add-host",
                given: format!("{} times", input.add_hosts.len()),
                expected: format!("at most {MAX_ADD_HOSTS}"),
            });
        }
        let add_hosts =
            input.add_hosts.iter().map(|text| parse_add_host(text)).collect::<Result<_, _>>()?;
        Ok(Self {
            image: input.image,
            command: input.command,
            entrypoint: input.entrypoint,
            env: input.env,
            workdir: input.workdir,
            user: input.user,
            hostname: input.hostname,
            add_hosts,
            network: NetworkSpec::check(&input.network)?,
            cpus,
            memory_mb: input.memory_mb,
            disk_size_mb: input.disk_size_mb,
            timeout: input.timeout,
            grace: input.graceful_shutdown.unwrap_or(DEFAULT_GRACE),
            stdin: input.stdin,
            terminal: input.terminal,
            privileged: input.privileged,
            ephemeral: input.remove,
        })
    }

    /// The number of virtual CPUs: the share, rounded up.
    #[must_use]
    pub const fn vcpus(&self) -> u32 {
        self.cpus.0.div_ceil(1000)
    }

    /// That there is nothing to run; the image's own may have been replaced.
    fn no_command(&self, replaced: bool) -> SpecError {
        let image = &self.image;
        let why = if replaced {
            format!("--entrypoint replaces the command of image {image:?} too")
        } else {
            format!("image {image:?} has no command of its own")
        };
        SpecError::NoCommand { why }
    }

    /// The command to run in this VM: the image's config under what the user gave.
    ///
    /// As docker does, `--entrypoint` also clears the image's command.
    ///
    /// # Errors
    /// When there is nothing to run, or it is too long.
    pub fn command(&self, image: &ImageConfig) -> Result<ExecSpec, SpecError> {
        let mut argv: Vec<Vec<u8>> = Vec::new();
        match self.entrypoint.as_deref() {
            Some("") => {}
            Some(entrypoint) => argv.push(entrypoint.as_bytes().to_vec()),
            None => argv.extend(image.entrypoint.iter().map(|word| word.as_bytes().to_vec())),
        }
        if self.command.is_empty() {
            if self.entrypoint.is_none() {
                argv.extend(image.cmd.iter().map(|word| word.as_bytes().to_vec()));
            }
        } else {
            argv.extend(self.command.iter().cloned());
        }
        if argv.is_empty() {
            let image_has_one = !(image.entrypoint.is_empty() && image.cmd.is_empty());
            return Err(self.no_command(self.entrypoint.is_some() && image_has_one));
        }
        let env = self.environment(image);
        check_length(&argv, &env)?;
        Ok(ExecSpec {
            argv,
            env,
            cwd: self.workdir.clone().or_else(|| non_empty(&image.working_dir)),
            user: self.user.clone().or_else(|| non_empty(&image.user)),
            stdin: self.stdin,
            terminal: self.terminal.clone(),
            stop_signal: signal::number(&image.stop_signal),
        })
    }

    /// A further command in this VM (`exec`): what it does not say is as for the VM's own command.
    ///
    /// # Errors
    /// When it is empty, too long, or its working directory or user has no form of one.
    pub fn further_command(
        &self,
        image: &ImageConfig,
        request: ExecSpec,
    ) -> Result<ExecSpec, SpecError> {
        if request.argv.is_empty() {
            return Err(self.no_command(false));
        }
        if let Some(workdir) = &request.cwd {
            check_workdir(workdir)?;
        }
        if let Some(user) = &request.user {
            check_user(user)?;
        }
        let mut env = self.environment(image);
        env.extend(request.env);
        check_length(&request.argv, &env)?;
        let own_cwd = || self.workdir.clone().or_else(|| non_empty(&image.working_dir));
        let own_user = || self.user.clone().or_else(|| non_empty(&image.user));
        Ok(ExecSpec {
            argv: request.argv,
            env,
            cwd: request.cwd.or_else(own_cwd),
            user: request.user.or_else(own_user),
            stdin: request.stdin,
            terminal: request.terminal,
            stop_signal: request.stop_signal,
        })
    }

    /// The environment of a command in this VM: the image's, then the user's.
    #[must_use]
    pub fn environment(&self, image: &ImageConfig) -> Vec<(Vec<u8>, Vec<u8>)> {
        let from_image = image
            .env
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
        let from_user =
            self.env.iter().map(|var| (var.name.as_bytes().to_vec(), var.value.clone()));
        from_image.chain(from_user).collect()
    }

    /// What the guest of this VM is told; `subnet` is the one that was given to it.
    #[must_use]
    pub fn guest_config(&self, vm: VmId, subnet: Option<Subnet>) -> GuestConfig {
        let fractional = !self.cpus.0.is_multiple_of(1000);
        let servers = self.network.iter().flat_map(|network| &network.dns_servers);
        let network = self.network.as_ref().zip(subnet).map(|(network, subnet)| GuestNetwork {
            mac: vm.mac(),
            address: subnet.guest(),
            prefix: subnet.cidr.prefix(),
            gateway: subnet.gateway(),
            gateway_mac: vm.gateway_mac(),
            mtu: network.mtu,
        });
        GuestConfig {
            hostname: self.hostname.clone().unwrap_or_else(|| vm.to_string()),
            add_hosts: self.add_hosts.clone(),
            dns_servers: servers.copied().map(IpAddr::V4).collect(),
            cpu_millis: if fractional { self.cpus.0 } else { 0 },
            network,
        }
    }

    /// The specification as it is stored and shown: without what counts as a secret.
    #[must_use]
    pub fn redacted_json(&self) -> String {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let env: serde_json::Map<String, serde_json::Value> = self
            .env
            .iter()
            .filter(|var| !var.secret)
            .map(|var| (var.name.clone(), text(&var.value).into()))
            .collect();
        let env_from_host: Vec<&str> =
            self.env.iter().filter(|var| var.secret).map(|var| var.name.as_str()).collect();
        json!({
            "image": self.image,
            "command": self.command.iter().map(|word| text(word)).collect::<Vec<_>>(),
            "entrypoint": self.entrypoint,
            "env": env,
            "env_from_host": env_from_host,
            "workdir": self.workdir,
            "user": self.user,
            "tty": self.terminal.is_some(),
            "privileged": self.privileged,
            "resources": {
                "cpus": f64::from(self.cpus.0) / 1000.0,
                "memory_mb": self.memory_mb,
                "disk_size_mb": self.disk_size_mb,
                "timeout_seconds": self.timeout.map(seconds),
            },
            "network": {
                "no_network": self.network.is_none(),
                "mtu": self.network.as_ref().map(|network| network.mtu),
                "dns_servers": self.network.as_ref().map(|network| &network.dns_servers),
                "allow_private": self.network.as_ref().map(|network| network.allow_private),
                "allow_host_access":
                    self.network.as_ref().map(|network| network.allow_host_access),
                "hostname": self.hostname,
                "add_hosts": self.add_hosts,
            },
            "remove": self.ephemeral,
            "graceful_shutdown_ms": u64::try_from(self.grace.as_millis()).unwrap_or(u64::MAX),
        })
        .to_string()
    }
}

/// As the reference's key wants them: whole, never less than the limit.
const fn seconds(limit: Duration) -> u64 {
    limit.as_secs() + (limit.subsec_nanos() > 0) as u64
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// Reads one `-e` value: `NAME=VALUE`, or `NAME` for the caller's own value.
///
/// # Errors
/// When the name is empty or holds a NUL, or the caller's environment has no such variable.
pub fn parse_env(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<Vec<u8>>,
) -> Result<EnvVar, SpecError> {
    let refused = |expected| SpecError::Form {
        what: "invalid environment variable",
        given: text.split('=').next().unwrap_or_default().to_owned(),
        expected,
    };
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.as_bytes().to_vec())),
        None => (text, None),
    };
    if name.is_empty() || text.contains('\0') {
        return Err(refused("use NAME=VALUE or NAME"));
    }
    // `export A=1`, `A = 1`: the variable that was meant would not be set.
    if name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"' || c == '\'') {
        return Err(refused("a name has no blanks and no quotes; use NAME=VALUE"));
    }
    let secret = value.is_none();
    let value = match value {
        Some(value) => value,
        None => lookup(name)
            .ok_or_else(|| refused("it is not set in your environment; use NAME=VALUE"))?,
    };
    Ok(EnvVar { name: name.to_owned(), value, secret })
}

/// The lines of an environment file that hold variables, each with its number from 1: trimmed,
/// without blank lines and comments.
pub fn env_file_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = (1..).zip(text.lines().map(str::trim));
    numbered.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

impl fmt::Display for CpuMillis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1000.0)
    }
}

#[cfg(test)]
mod tests;
