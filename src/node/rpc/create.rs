//! `create`: from its parameters to a VM.
//!
//! What belongs to a feature that is not there yet is refused by its name; what nobody knows is
//! refused too, since a misspelt setting would silently not hold.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use matchlock_actors::vm::{CreateVm, StartMode};
use matchlock_host::facts;
use matchlock_host::guest_bundle::GuestBundle;
use matchlock_host::image::BlobLease;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::{ImageConfig, ImageRecord};
use matchlock_model::signal;
use matchlock_model::spec::{
    EnvVar, NetworkInput, VmSpec, VmSpecInput, check_user, check_workdir, parse_env,
};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::protocol::{Code, RpcError};
use crate::node::config::NodeConfig;

const DEFAULT_CPUS: f64 = 1.0;
const DEFAULT_MEMORY_MB: u64 = 512;
const DEFAULT_DISK_SIZE_MB: u64 = 5120;

/// The parameters of `create`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct CreateParams {
    image: String,
    /// Ours to choose.
    id: Option<IgnoredAny>,
    privileged: bool,
    pub(super) launch_entrypoint: bool,
    kernel: Option<Kernel>,
    resources: Option<Resources>,
    network: Option<Network>,
    vfs: Option<Vfs>,
    env: Option<BTreeMap<String, String>>,
    extra_disks: Option<Vec<IgnoredAny>>,
    image_config: Option<ImageConfig>,
    /// Ours: the VM's record goes with the VM.
    remove: bool,
    /// Ours: the VM gets an owner of its own, and outlives the session.
    pub(super) detached: bool,
    /// Ours: the VM boots, also where there is a snapshot to start from.
    cold: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Kernel {
    r#ref: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Resources {
    cpus: f64,
    memory_mb: u64,
    disk_size_mb: u64,
    timeout_seconds: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Network {
    allowed_hosts: Option<Vec<String>>,
    add_hosts: Option<Vec<AddHost>>,
    block_private_ips: Option<bool>,
    /// Ours: the VM may reach this host.
    allow_host_access: bool,
    no_network: bool,
    intercept: bool,
    interception: Option<IgnoredAny>,
    secrets: Option<BTreeMap<String, IgnoredAny>>,
    dns_servers: Option<Vec<String>>,
    hostname: String,
    mtu: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AddHost {
    host: String,
    ip: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Vfs {
    workspace: String,
    mounts: Option<BTreeMap<String, IgnoredAny>>,
    interception: Option<IgnoredAny>,
}

/// What a VM is to be.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) spec: VmSpec,
    /// Instead of the image's own.
    pub(super) image_config: ImageConfig,
    pub(super) kernel: Option<PathBuf>,
    start: StartMode,
}

impl CreateParams {
    /// The first thing that is asked for and not there yet.
    fn not_there_yet(&self) -> Option<&'static str> {
        let network = self.network.as_ref();
        let vfs = self.vfs.as_ref();
        let is_full = |list: Option<usize>| list.is_some_and(|length| length > 0);
        [
            (
                "network.allowed_hosts",
                is_full(network.and_then(|n| n.allowed_hosts.as_ref()).map(Vec::len)),
            ),
            ("network.intercept", network.is_some_and(|n| n.intercept)),
            ("network.interception", network.is_some_and(|n| n.interception.is_some())),
            (
                "network.secrets",
                is_full(network.and_then(|n| n.secrets.as_ref()).map(BTreeMap::len)),
            ),
            ("vfs.mounts", is_full(vfs.and_then(|v| v.mounts.as_ref()).map(BTreeMap::len))),
            ("vfs.interception", vfs.is_some_and(|v| v.interception.is_some())),
            ("vfs.workspace", vfs.is_some_and(|v| !v.workspace.is_empty())),
            ("extra_disks", is_full(self.extra_disks.as_ref().map(Vec::len))),
        ]
        .into_iter()
        .find_map(|(name, asked)| asked.then_some(name))
    }

    /// The arguments of the `run -d` that brings the same VM up with an owner of its own, and the
    /// kernel that it is to boot. To be asked before [`Self::check`], which says what is wrong.
    ///
    /// # Errors
    /// What a detached VM cannot have.
    pub(super) fn run_arguments(&self) -> Result<RunArguments, RpcError> {
        let resources = self.resources.clone().unwrap_or_default();
        let stop_signal = self.image_config.iter().any(|image| !image.stop_signal.is_empty());
        let refused = [
            ("remove", self.remove),
            ("resources.timeout_seconds", resources.timeout_seconds > 0),
            ("image_config.stop_signal", stop_signal),
        ];
        if let Some((name, _)) = refused.into_iter().find(|(_, given)| *given) {
            return Err(RpcError::params(format!("detached cannot be combined with {name}")));
        }
        let mut arguments: Vec<OsString> = vec!["run".into(), "-d".into()];
        let is_bare = |flag: &str| {
            ["privileged", "cold", "no-network", "allow-private", "allow-host-access"]
                .contains(&flag)
        };
        let mut add = |flag: &str, value: &str| {
            let argument =
                if is_bare(flag) { format!("--{flag}") } else { format!("--{flag}={value}") };
            arguments.push(argument.into());
        };
        add("image", &self.image);
        if resources.cpus != 0.0 {
            add("cpus", &resources.cpus.to_string());
        }
        for (flag, value) in
            [("memory", resources.memory_mb), ("disk-size", resources.disk_size_mb)]
        {
            if value > 0 {
                add(flag, &value.to_string());
            }
        }
        let bare = [("privileged", self.privileged), ("cold", self.cold)];
        bare.iter().filter(|(_, given)| *given).for_each(|(flag, _)| add(flag, ""));
        self.network_arguments(&mut add);
        let image = self.image_config.clone().unwrap_or_default();
        let mut env_file = String::new();
        for (name, value) in image.env.iter().chain(self.env.iter().flatten()) {
            env_file.push_str(&env_file_line(name, value)?);
        }
        for (flag, value) in [("user", &image.user), ("workdir", &image.working_dir)] {
            if !value.is_empty() {
                add(flag, value);
            }
        }
        let mut words = image.entrypoint.into_iter();
        let command: Vec<String> = if self.launch_entrypoint {
            if let Some(program) = words.next() {
                add("entrypoint", &program);
            }
            words.chain(image.cmd).collect()
        } else {
            // None at all.
            add("entrypoint", "");
            Vec::new()
        };
        if !command.is_empty() {
            arguments.push("--".into());
            arguments.extend(command.into_iter().map(OsString::from));
        }
        Ok(RunArguments { arguments, env_file })
    }

    fn network_arguments(&self, add: &mut impl FnMut(&str, &str)) {
        let Some(network) = &self.network else { return };
        if !network.hostname.is_empty() {
            add("hostname", &network.hostname);
        }
        for AddHost { host, ip } in network.add_hosts.iter().flatten() {
            add("add-host", &format!("{host}:{ip}"));
        }
        if network.no_network {
            // A flag: it takes no value.
            return add("no-network", "");
        }
        if network.mtu > 0 {
            add("mtu", &network.mtu.to_string());
        }
        for server in network.dns_servers.iter().flatten() {
            add("dns-servers", server);
        }
        if network.block_private_ips == Some(false) {
            add("allow-private", "");
        }
        if network.allow_host_access {
            add("allow-host-access", "");
        }
    }

    /// Checks them.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(super) fn check(self) -> Result<Wanted, RpcError> {
        if self.image.is_empty() {
            return Err(RpcError::params("image is required (e.g., alpine:latest)"));
        }
        if self.id.is_some() {
            return Err(RpcError::params("id is internal-only and cannot be set"));
        }
        if let Some(name) = self.not_there_yet() {
            let text = format!("{name} is not available in this version yet");
            return Err(RpcError::params(text));
        }
        let kernel = self.kernel.map(kernel_of).transpose()?.flatten();
        let image_config = self.image_config.unwrap_or_default();
        check_image_config(&image_config)?;
        let resources = self.resources.unwrap_or_default();
        let network = self.network.unwrap_or_default();
        let or = |given: u64, default: u64| if given > 0 { given } else { default };
        let env = variables(self.env.unwrap_or_default())?;
        let host_cpus = facts::cpus().map_err(|e| host(&e))?;
        let add_hosts = network.add_hosts.unwrap_or_default();
        let cpus = resources.cpus;
        let input = VmSpecInput {
            image: self.image,
            command: Vec::new(),
            entrypoint: None,
            env,
            workdir: None,
            user: None,
            hostname: (!network.hostname.is_empty()).then_some(network.hostname),
            add_hosts: add_hosts.iter().map(|add| format!("{}:{}", add.host, add.ip)).collect(),
            // Without a network the rest of it means nothing, and is sent all the same.
            network: if network.no_network {
                NetworkInput { no_network: true, ..NetworkInput::default() }
            } else {
                NetworkInput {
                    no_network: false,
                    mtu: (network.mtu > 0).then_some(network.mtu),
                    dns_servers: network.dns_servers.unwrap_or_default(),
                    allow_private: network.block_private_ips == Some(false),
                    allow_host_access: network.allow_host_access,
                }
            },
            cpus: if cpus == 0.0 { DEFAULT_CPUS } else { cpus },
            memory_mb: or(resources.memory_mb, DEFAULT_MEMORY_MB),
            disk_size_mb: or(resources.disk_size_mb, DEFAULT_DISK_SIZE_MB),
            timeout: (resources.timeout_seconds > 0)
                .then(|| Duration::from_secs(resources.timeout_seconds)),
            graceful_shutdown: None,
            stdin: false,
            terminal: None,
            privileged: self.privileged,
            remove: self.remove,
            host_cpus: u32::try_from(host_cpus).unwrap_or(u32::MAX),
        };
        let spec = VmSpec::check(input).map_err(|e| RpcError::params(in_our_words(&e)))?;
        let start = if self.cold { StartMode::Cold } else { StartMode::Warm };
        Ok(Wanted { spec, image_config, kernel, start })
    }
}

/// What an image could say is checked where it is imported; this was said by a client.
fn check_image_config(given: &ImageConfig) -> Result<(), RpcError> {
    let refused = |e: &dyn std::fmt::Display| RpcError::params(format!("image_config: {e}"));
    variables(given.env.clone()).map_err(|e| refused(&e.message))?;
    if !given.user.is_empty() {
        check_user(&given.user).map_err(|e| refused(&in_our_words(&e)))?;
    }
    if !given.working_dir.is_empty() {
        check_workdir(&given.working_dir).map_err(|e| refused(&in_our_words(&e)))?;
    }
    let signal = &given.stop_signal;
    if !signal.is_empty() && signal::number(signal).is_none() {
        return Err(refused(&format_args!("stop_signal {signal:?}: there is no such signal")));
    }
    if given.entrypoint.iter().chain(&given.cmd).any(|word| word.contains('\0')) {
        return Err(refused(&"entrypoint and cmd cannot hold a NUL"));
    }
    Ok(())
}

/// The specification speaks of the command line's flags.
fn in_our_words(error: &impl ToString) -> String {
    let names = [
        ("--memory", "resources.memory_mb"),
        ("--disk-size", "resources.disk_size_mb"),
        ("--cpus", "resources.cpus"),
        ("--timeout", "resources.timeout_seconds"),
        ("--mtu", "network.mtu"),
        ("--dns-servers", "network.dns_servers"),
        ("--hostname", "network.hostname"),
        ("--add-host", "network.add_hosts"),
        ("--image", "image"),
        ("--user", "user"),
        ("--workdir", "working_dir"),
    ];
    names.iter().fold(error.to_string(), |text, (flag, name)| text.replace(flag, name))
}

/// A refusal of a command in our words.
pub(super) fn refused_input(failure: &Failure) -> RpcError {
    RpcError::params(in_our_words(&failure.message))
}

fn host(error: &(dyn std::error::Error + 'static)) -> RpcError {
    RpcError::failure(Code::Vm, &Failure::from_error(FailureKind::Host, error))
}

fn kernel_of(kernel: Kernel) -> Result<Option<PathBuf>, RpcError> {
    let text = kernel.r#ref;
    match text.strip_prefix("file://") {
        _ if text.is_empty() => Ok(None),
        Some(path) if path.starts_with('/') => Ok(Some(path.into())),
        Some(_) => Err(RpcError::params(format!("kernel.ref {text:?}: use file:///absolute/path"))),
        None => Err(RpcError::params(format!(
            "kernel.ref {text:?}: kernels from registries are not available in this version yet; use file:///absolute/path"
        ))),
    }
}

/// The environment that is given.
///
/// # Errors
/// When a name is none.
pub(super) fn variables(env: BTreeMap<String, String>) -> Result<Vec<EnvVar>, RpcError> {
    let variable = |(name, value): (String, String)| {
        if name.contains('=') {
            return Err(RpcError::params(format!("env: {name:?} is not a variable's name")));
        }
        parse_env(&format!("{name}={value}"), &|_| None)
            .map_err(|e| RpcError::params(format!("env: {e}")))
    };
    env.into_iter().map(variable).collect()
}

/// The image's configuration under what was given: an entrypoint also clears the image's command,
/// variables are added.
fn merged(mut image: ImageConfig, given: ImageConfig) -> ImageConfig {
    if !given.user.is_empty() {
        image.user = given.user;
    }
    if !given.working_dir.is_empty() {
        image.working_dir = given.working_dir;
    }
    if !given.entrypoint.is_empty() {
        image.entrypoint = given.entrypoint;
        image.cmd = Vec::new();
    }
    if !given.cmd.is_empty() {
        image.cmd = given.cmd;
    }
    image.env.extend(given.env);
    image.labels.extend(given.labels);
    if !given.stop_signal.is_empty() {
        image.stop_signal = given.stop_signal;
    }
    image
}

/// Finds what the VM is made of on this host.
///
/// # Errors
/// What is missing.
pub(super) fn prepare(
    config: &NodeConfig,
    wanted: Wanted,
    image: ImageRecord,
) -> Result<CreateVm, RpcError> {
    let kernel = wanted.kernel.or_else(|| config.kernel.clone());
    let (bundle, guest_lease) =
        GuestBundle::find_leased(&config.cache, kernel).map_err(|e| host(&e))?;
    let lease = BlobLease::take(image.rootfs_path.as_ref()).map_err(|e| host(&e))?;
    Ok(CreateVm {
        spec: wanted.spec,
        image: merged(image.config, wanted.image_config),
        base_disk: image.rootfs_path.into(),
        lease: Some(lease),
        guest_lease: guest_lease.map(Arc::new),
        kernel: bundle.kernel,
        initramfs: bundle.initramfs,
        start: wanted.start,
    })
}

/// The arguments of a `run -d`, but for `--env-file`.
#[derive(Debug)]
pub(super) struct RunArguments {
    /// For everybody to see.
    pub(super) arguments: Vec<OsString>,
    /// The content of its environment file: values are nobody else's matter.
    pub(super) env_file: String,
}

fn env_file_line(name: &str, value: &str) -> Result<String, RpcError> {
    if name.starts_with('#') {
        return Err(RpcError::params(format!(
            "env {name}: of a detached VM a name cannot begin with #"
        )));
    }
    if value.contains('\n') || value.trim_end() != value {
        return Err(RpcError::params(format!(
            "env {name}: of a detached VM a value cannot hold a line break or end with a blank"
        )));
    }
    Ok(format!("{name}={value}\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(params: Value) -> Result<Wanted, RpcError> {
        serde_json::from_value::<CreateParams>(params)
            .map_err(|e| RpcError::params(e.to_string()))?
            .check()
    }

    fn refusal(params: Value) -> String {
        let error = check(params).unwrap_err();
        assert_eq!(error.code, Code::InvalidParams);
        error.message
    }

    #[test]
    fn what_is_not_said_is_as_in_the_reference() {
        let spec = check(json!({"image": "busybox"})).unwrap().spec;
        assert_eq!((spec.cpus.0, spec.memory_mb, spec.disk_size_mb), (1000, 512, 5120));
        assert!(!spec.ephemeral && spec.timeout.is_none());
        let network = spec.network.unwrap();
        assert_eq!(
            (network.mtu, network.allow_private, network.allow_host_access),
            (1500, false, false)
        );
        let zeros = json!({"image": "busybox", "resources": {"cpus": 0, "memory_mb": 0}});
        assert_eq!(check(zeros).unwrap().spec.memory_mb, 512);
    }

    #[test]
    fn what_the_sdk_sends_is_understood() {
        let wanted = check(json!({
            "image": "busybox", "launch_entrypoint": true, "kernel": {"ref": "file:///k"},
            "resources": {"cpus": 0.5, "memory_mb": 256, "disk_size_mb": 64, "timeout_seconds": 9},
            "network": {
                "allowed_hosts": [], "block_private_ips": false, "hostname": "web", "mtu": 1400,
                "add_hosts": [{"host": "db", "ip": "10.0.0.7"}], "dns_servers": ["1.1.1.1"],
            },
            "env": {"A": "1=2"}, "image_config": {"user": "1000", "env": {"B": "2"}},
        }))
        .unwrap();
        assert_eq!(wanted.kernel, Some("/k".into()));
        assert_eq!(wanted.spec.cpus.0, 500);
        assert_eq!(wanted.spec.timeout.unwrap().as_secs(), 9);
        assert!(wanted.spec.network.as_ref().unwrap().allow_private);
        let image = ImageConfig {
            cmd: vec!["sh".into()],
            env: [("PATH".into(), "/bin".into())].into(),
            ..ImageConfig::default()
        };
        let command = wanted.spec.command(&merged(image, wanted.image_config)).unwrap();
        assert_eq!((command.argv, command.user), (vec![b"sh".to_vec()], Some("1000".into())));
        let names: Vec<&[u8]> = command.env.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, [&b"B"[..], b"PATH", b"A"], "the image's are kept");

        let nothing =
            json!({"image": "b", "network": {"no_network": true, "dns_servers": ["1.1.1.1"]}});
        assert!(check(nothing).unwrap().spec.network.is_none());
    }

    #[test]
    fn a_detached_vm_is_a_run_with_the_same_settings() {
        let arguments = |params: Value| -> Vec<String> {
            let params: CreateParams = serde_json::from_value(params).unwrap();
            let run = params.run_arguments().unwrap();
            assert_eq!(run.env_file, if params.env.is_some() { "A=1\n" } else { "" });
            run.arguments.into_iter().map(|word| word.into_string().unwrap()).collect()
        };
        let bare = arguments(json!({"image": "b", "network": {"no_network": true}}));
        assert_eq!(bare, ["run", "-d", "--image=b", "--no-network", "--entrypoint="]);
        let all = arguments(json!({
            "image": "b", "launch_entrypoint": true, "env": {"A": "1"},
            "resources": {"cpus": 0.5, "memory_mb": 256, "disk_size_mb": 64},
            "network": {"block_private_ips": false, "hostname": "web", "mtu": 1400,
                "add_hosts": [{"host": "db", "ip": "::1"}], "dns_servers": ["1.1.1.1"]},
            "image_config": {"user": "1", "working_dir": "/w", "entrypoint": ["a", "b"], "cmd": ["c"]},
        }));
        let expected = [
            "run",
            "-d",
            "--image=b",
            "--cpus=0.5",
            "--memory=256",
            "--disk-size=64",
            "--hostname=web",
            "--add-host=db:::1",
            "--mtu=1400",
            "--dns-servers=1.1.1.1",
            "--allow-private",
            "--user=1",
            "--workdir=/w",
            "--entrypoint=a",
            "--",
            "b",
            "c",
        ];
        assert_eq!(all, expected);
        let timed = json!({"image": "b", "resources": {"timeout_seconds": 1}});
        let params: CreateParams = serde_json::from_value(timed).unwrap();
        assert!(params.run_arguments().unwrap_err().message.contains("timeout_seconds"));
        for value in ["two\nlines", "blank "] {
            let params = json!({"image": "b", "env": {"A": value}});
            let params: CreateParams = serde_json::from_value(params).unwrap();
            let refused = params.run_arguments().unwrap_err();
            assert!(refused.message.starts_with("env A: "), "{refused:?}");
        }
    }

    #[test]
    fn an_entrypoint_clears_the_images_command() {
        let image = ImageConfig {
            entrypoint: vec!["a".into()],
            cmd: vec!["b".into()],
            ..ImageConfig::default()
        };
        let given = ImageConfig { entrypoint: vec!["c".into()], ..ImageConfig::default() };
        let merged = merged(image, given);
        assert_eq!((merged.entrypoint, merged.cmd), (vec!["c".to_owned()], vec![]));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (params, words) in [
            (json!({}), "image is required"),
            (json!({"image": "b", "id": "vm-00000000"}), "internal-only"),
            (json!({"image": "b", "imagee": 1}), "imagee"),
            (json!({"image": "b", "resources": {"memory": 1}}), "unknown field `memory`"),
            (json!({"image": "b", "resources": {"memory_mb": 1}}), "resources.memory_mb 1"),
            (json!({"image": "b", "resources": {"cpus": -1}}), "resources.cpus"),
            (json!({"image": "b", "network": {"mtu": 1}}), "network.mtu 1"),
            (json!({"image": "b", "env": {"A=": "x"}}), "not a variable's name"),
            (json!({"image": "b", "kernel": {"ref": "file://k"}}), "absolute"),
            (json!({"image": "b", "kernel": {"ref": "ghcr.io/k:1"}}), "not available"),
            (
                json!({"image": "b", "network": {"allowed_hosts": ["x"]}}),
                "network.allowed_hosts is",
            ),
            (json!({"image": "b", "network": {"intercept": true}}), "network.intercept is"),
            (json!({"image": "b", "network": {"interception": {}}}), "network.interception is"),
            (
                json!({"image": "b", "network": {"secrets": {"K": {"value": "x", "placeholder": "p"}}}}),
                "network.secrets is",
            ),
            (json!({"image": "b", "vfs": {"mounts": {"/w": {"type": "memory"}}}}), "vfs.mounts is"),
            (json!({"image": "b", "vfs": {"workspace": "/w"}}), "vfs.workspace is"),
            (json!({"image": "b", "vfs": {"interception": {}}}), "vfs.interception is"),
            (json!({"image": "b", "extra_disks": [{}]}), "extra_disks is"),
            (json!({"image": "b", "image_config": {"stop_signal": "SIGNO"}}), "no such signal"),
        ] {
            let text = refusal(params.clone());
            assert!(text.contains(words), "{params}: {text}");
        }
    }
}
