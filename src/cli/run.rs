//! `matchlock run`: boot a microVM, run a command in it, pass its exit code on, leave nothing.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use matchlock_actors::fleet::VmHandle;
use matchlock_actors::vm::CreateVm;
use matchlock_host::facts;
use matchlock_host::guest_bundle::GuestBundle;
use matchlock_host::image::BlobLease;
use matchlock_host::image::ImageDirs;
use matchlock_model::exec::ExecSpec;
use matchlock_model::exit;
use matchlock_model::failure::FailureKind;
use matchlock_model::image::ImageRecord;
use matchlock_model::spec::{EnvVar, NetworkInput, VmSpec, VmSpecInput, env_file_lines, parse_env};
use matchlock_model::view::VmView;
use matchlock_model::vm::StopMode;

use super::error::CliError;
use super::later::LaterRunFlags;
use super::render;
use super::timings::Stopwatch;
use crate::node::boot::Node;
use crate::node::client::{not_cleaned_up, running, settled};
use crate::node::config::NodeConfig;
use crate::node::relay::{Ending, RelayLimits, relay};
use crate::node::signals::{Interrupt, Interrupts};
use crate::points::{EXEC, injected};

/// The arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: the command's own; 124 --timeout passed; 125 matchlock failed; 126 the command cannot
be executed; 127 it was not found; 128+n it was ended by signal n; 130, 143 or 129 when run itself
was interrupted by SIGINT, SIGTERM or SIGHUP, whatever the command made of the signal. With --rm=false
the command's own code comes once the VM has been ended.

Examples:
  matchlock run --image busybox -- sh -c 'exit 7'; echo $?
  matchlock run --image busybox -e WHO=world -w /tmp -u 1000 -- sh -c 'echo hello $WHO; pwd; id -u'
  matchlock run -i --image busybox -- sha256sum < file
  matchlock run --rm=false --image busybox        (keeps the VM until a signal or `matchlock kill`)")]
pub(super) struct RunArgs {
    /// Image to run: a tag that `matchlock image ls` lists
    #[arg(long)]
    image: String,
    /// Remove the VM when its command has ended; --rm=false keeps it until a signal
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", value_name = "BOOL")]
    rm: bool,
    /// Set a variable: NAME=VALUE, or NAME for your own value (never stored)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Read variables from a file: one NAME=VALUE or NAME a line, # for comments
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory in the guest, made if missing
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User in the guest: uid, uid:gid, name or name:group
    #[arg(short, long)]
    user: Option<String>,
    /// Program instead of the image's entrypoint; empty clears it
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Hostname of the guest (default: the VM's id)
    #[arg(long)]
    hostname: Option<String>,
    /// Add a line to the guest's /etc/hosts
    #[arg(long, value_name = "HOST:IP", value_delimiter = ',')]
    add_host: Vec<String>,
    /// CPUs, also fractions: 0.5 gives the guest's commands half of one
    #[arg(long, default_value_t = 1.0)]
    cpus: f64,
    /// Memory in MB
    #[arg(long, default_value_t = 512, value_name = "MB")]
    memory: u64,
    /// Writable disk in MB; it takes space only as it fills
    #[arg(long, default_value_t = 5120, value_name = "MB")]
    disk_size: u64,
    /// Seconds that the command may take
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// How long a stop waits for the guest, e.g. 10s, 500ms
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    graceful_shutdown: Option<Duration>,
    /// Give the command our stdin
    #[arg(short, long)]
    interactive: bool,
    /// No NIC at all: needs no privilege
    #[arg(long)]
    no_network: bool,
    /// Largest packet in bytes, on both ends [default: 1500]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u64>,
    /// Name servers of the guest, IPv4 [default: 8.8.8.8,8.8.4.4]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    dns_servers: Vec<String>,
    /// Let the guest reach private networks too (10/8, 172.16/12, 192.168/16, 100.64/10)
    #[arg(long)]
    allow_private: bool,
    /// Let the guest reach this host's own addresses too
    #[arg(long)]
    allow_host_access: bool,
    /// Hypervisor
    #[arg(long, value_enum, default_value = "auto", env = "MATCHLOCK_HYPERVISOR")]
    hypervisor: HypervisorChoice,
    /// Print how long each step took
    #[arg(long)]
    timings: bool,
    #[command(flatten)]
    later: LaterRunFlags,
    /// Command and its arguments (default: the image's own)
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Which hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum HypervisorChoice {
    /// The best that works here
    Auto,
    /// Not available in this version yet
    Firecracker,
    /// QEMU: with KVM where it works, otherwise by translation
    Qemu,
}

/// Reads `10s`, `1m30s`, `500ms`, or a bare number of seconds.
fn parse_duration(text: &str) -> Result<Duration, humantime::DurationError> {
    match text.parse::<u32>() {
        Ok(seconds) => Ok(Duration::from_secs(seconds.into())),
        Err(_) => humantime::parse_duration(text),
    }
}

pub(super) async fn run(args: RunArgs, config: NodeConfig) -> Result<u8, CliError> {
    let mut watch = Stopwatch::start();
    let timings = args.timings;
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let spec = check(args)?;
    let image = find_image(&config, &spec.image)?;
    let command = own_command(&spec, &image)?;
    let bundle = GuestBundle::find(&config.cache, config.kernel.clone())
        .map_err(|e| CliError::failure(&e))?;
    let lease = BlobLease::take(image.rootfs_path.as_ref()).map_err(|e| CliError::failure(&e))?;
    let node = Node::boot(config).await?;
    node.deps().hypervisor.check().map_err(|e| CliError::failure(&e))?;
    watch.image = Some(watch.elapsed());
    let create = CreateVm {
        spec: spec.clone(),
        image: image.config,
        base_disk: image.rootfs_path.into(),
        lease: Some(lease),
        kernel: bundle.kernel,
        initramfs: bundle.initramfs,
    };
    let result = in_vm(&node, create, &spec, command, &mut interrupts, &mut watch).await;
    let shutdown = node.shutdown(StopMode::Force).await;
    let (code, view) = result?;
    shutdown?;
    if timings {
        watch.print(&view.timings);
    }
    Ok(code)
}

fn check(args: RunArgs) -> Result<VmSpec, CliError> {
    args.later.refuse()?;
    if args.hypervisor == HypervisorChoice::Firecracker {
        return Err(CliError::input(
            "--hypervisor firecracker is not available in this version yet; use auto or qemu",
        ));
    }
    let env = environment(&args.env_file, &args.env)?;
    let host_cpus = facts::cpus().map_err(|e| CliError::failure(&e))?;
    VmSpec::check(VmSpecInput {
        image: args.image,
        command: args.command.into_iter().map(OsStringExt::into_vec).collect(),
        entrypoint: args.entrypoint,
        env,
        workdir: args.workdir,
        user: args.user,
        hostname: args.hostname,
        add_hosts: args.add_host,
        network: NetworkInput {
            no_network: args.no_network,
            mtu: args.mtu,
            dns_servers: args.dns_servers,
            allow_private: args.allow_private,
            allow_host_access: args.allow_host_access,
        },
        cpus: args.cpus,
        memory_mb: args.memory,
        disk_size_mb: args.disk_size,
        timeout_s: args.timeout,
        graceful_shutdown: args.graceful_shutdown,
        stdin: args.interactive,
        remove: args.rm,
        host_cpus: u32::try_from(host_cpus).unwrap_or(u32::MAX),
    })
    .map_err(CliError::input)
}

/// The variables of the files, in order, then those of the command line.
pub(super) fn environment(files: &[PathBuf], given: &[String]) -> Result<Vec<EnvVar>, CliError> {
    let lookup = |name: &str| std::env::var_os(name).map(OsStringExt::into_vec);
    let mut env = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|e| {
            CliError::input(format_args!("could not read --env-file {}: {e}", file.display()))
        })?;
        for line in env_file_lines(&text) {
            env.push(parse_env(line, &lookup).map_err(|e| {
                CliError::input(format_args!("--env-file {}: {e}", file.display()))
            })?);
        }
    }
    for text in given {
        env.push(parse_env(text, &lookup).map_err(CliError::input)?);
    }
    Ok(env)
}

fn find_image(config: &NodeConfig, tag: &str) -> Result<ImageRecord, CliError> {
    let images = matchlock_store::read_images(&ImageDirs::new(&config.cache).images)
        .map_err(|e| CliError::failure(&e))?;
    let found = match images {
        Some(images) => images.find(tag).map_err(|e| CliError::failure(&e))?,
        None => None,
    };
    found.ok_or_else(|| {
        CliError::message(format_args!(
            "image not found: {tag:?}; import it with `matchlock image import {tag} < archive.tar`, \
             or choose one of `matchlock image ls`"
        ))
    })
}

/// The VM's own command; none is needed for a VM that is kept.
fn own_command(spec: &VmSpec, image: &ImageRecord) -> Result<Option<ExecSpec>, CliError> {
    match spec.command(&image.config) {
        Ok(command) => Ok(Some(command)),
        Err(matchlock_model::spec::SpecError::NoCommand { .. }) if !spec.ephemeral => Ok(None),
        Err(error) => Err(CliError::input(error)),
    }
}

/// From the VM's creation to its end.
async fn in_vm(
    node: &Node,
    create: CreateVm,
    spec: &VmSpec,
    command: Option<ExecSpec>,
    interrupts: &mut Interrupts,
    watch: &mut Stopwatch,
) -> Result<(u8, VmView), CliError> {
    let client = node.client();
    let before = watch.elapsed();
    let mut vm = client.create_vm(create).await?;
    let up = tokio::select! {
        up = running(&mut vm) => up,
        which = interrupts.next() => {
            let view = stop_interruptibly(node, &vm, StopMode::Force, interrupts).await?;
            return Ok((which.exit_code(), view));
        }
    };
    let up = match up {
        Ok(up) => up,
        Err(failure) => {
            // The cause is known before the clean-up is done; a failed clean-up is worth more.
            let view = settled(vm.clone()).await?;
            let left = still_held(&view);
            // Somebody ended it while it came up: that is no failure of ours.
            if failure.kind == FailureKind::Cancelled && left.is_empty() {
                render::note(&failure.to_string());
                return Ok((exit::by_signal(SIGKILL), view));
            }
            return Err(CliError::message(format_args!("{failure}{left}")));
        }
    };
    let spawned = up.timings.disk.unwrap_or_default() + up.timings.spawn.unwrap_or_default();
    watch.spawned = Some(before + spawned);
    let code = match &command {
        Some(command) => Some(own(node, &vm, spec, command, interrupts, watch).await),
        None => None,
    };
    if spec.ephemeral {
        let view = stop_interruptibly(node, &vm, StopMode::Force, interrupts).await;
        return Ok((code.unwrap_or(Ok(0))?, view?));
    }
    keep(node, &vm, spec, code, interrupts).await
}

/// What a settled VM still holds, for the end of an error line.
fn still_held(view: &VmView) -> String {
    not_cleaned_up(view).map(|text| format!("; {text}")).unwrap_or_default()
}

/// Runs the VM's own command to its end.
async fn own(
    node: &Node,
    vm: &VmHandle,
    spec: &VmSpec,
    command: &ExecSpec,
    interrupts: &mut Interrupts,
    watch: &mut Stopwatch,
) -> Result<u8, CliError> {
    if !spec.ephemeral {
        announce(vm);
    }
    let started = watch.elapsed();
    let session = node.client().exec_own(vm.id, command).await?;
    let limits = RelayLimits { timeout: spec.timeout, grace: spec.grace };
    EXEC.before("relay").map_err(injected)?;
    let ending = relay(session, spec.stdin, limits, interrupts).await;
    EXEC.after("relay").map_err(injected)?;
    watch.exec = Some(watch.elapsed() - started);
    watch.command_ended = Some(Stopwatch::now());
    match ending {
        Ending::Lost(lost) => Err(why_lost(vm, &lost).await),
        ending => exit_code(ending, spec.timeout),
    }
}

/// The exit code that an ending has.
pub(super) fn exit_code(ending: Ending, timeout: Option<Duration>) -> Result<u8, CliError> {
    match ending {
        Ending::Exited(status) => Ok(status.shell_code()),
        Ending::Interrupted(which) => Ok(which.exit_code()),
        Ending::Refused(refusal) => {
            Err(CliError::message(&refusal.message).with_code(refusal.exit_code()))
        }
        Ending::TimedOut => {
            let limit = timeout.unwrap_or_default();
            let text = format!("the command took longer than --timeout {}", limit.as_secs());
            Err(CliError::message(text).with_code(exit::TIMEOUT))
        }
        Ending::OutputClosed(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            Ok(exit::by_signal(SIGPIPE))
        }
        Ending::OutputClosed(error) => {
            Err(CliError::message(format_args!("could not write the command's output: {error}")))
        }
        Ending::Lost(lost) => Err(CliError::failure(&lost)),
    }
}

const SIGPIPE: u8 = 13;
const SIGKILL: u8 = 9;

/// A command whose guest was lost: the VM knows why.
async fn why_lost(vm: &VmHandle, lost: &matchlock_host::guest_link::LinkError) -> CliError {
    match settled(vm.clone()).await {
        Ok(view) => match &view.cause {
            // By force, from an owner that did not answer: what is left is not ours to tell.
            Some(cause) if cause.kind == FailureKind::Fenced => {
                CliError::failure(cause).with_code(exit::by_signal(SIGKILL))
            }
            Some(cause) => CliError::message(format_args!(
                "the VM ended while its command ran: {cause}{}",
                still_held(&view)
            )),
            // Somebody asked for it (`matchlock kill`), without a grace.
            None => CliError::message(format_args!("the VM was killed"))
                .with_code(exit::by_signal(SIGKILL)),
        },
        Err(failure) => CliError::message(format_args!("{lost}; {failure}")),
    }
}

fn announce(vm: &VmHandle) {
    render::note(&format!("VM {} is running", vm.id));
    render::note(&format!("  connect: matchlock exec {} -- sh", vm.id));
    render::note(&format!("  stop:    matchlock kill {}", vm.id));
}

/// Keeps a VM (`--rm=false`) until a signal or until somebody else ends it. The exit code is the
/// command's; without a command it says how the VM ended.
async fn keep(
    node: &Node,
    vm: &VmHandle,
    spec: &VmSpec,
    own: Option<Result<u8, CliError>>,
    interrupts: &mut Interrupts,
) -> Result<(u8, VmView), CliError> {
    let mut by_signal = interrupts.first();
    if by_signal.is_none() {
        match &own {
            Some(Err(error)) => render::error(error),
            Some(Ok(code)) => render::note(&format!(
                "the command ended with {code}; VM {} is kept until a signal or `matchlock kill {}`",
                vm.id, vm.id
            )),
            None => announce(vm),
        }
        tokio::select! {
            view = settled(vm.clone()) => {
                let view = view?;
                return match &view.cause {
                    Some(cause) => Err(CliError::message(format_args!(
                        "the VM ended: {cause}{}", still_held(&view)
                    ))),
                    None => Ok((kept_code(own, None), view)),
                };
            }
            which = interrupts.next() => by_signal = Some(which),
        }
    }
    let mode = StopMode::Graceful(spec.grace);
    let view = stop_interruptibly(node, vm, mode, interrupts).await?;
    Ok((kept_code(own, by_signal), view))
}

/// An error of the command was printed when it came.
fn kept_code(own: Option<Result<u8, CliError>>, by_signal: Option<Interrupt>) -> u8 {
    match (own, by_signal) {
        (Some(Ok(code)), _) => code,
        (Some(Err(error)), _) => error.exit_code(true),
        (None, Some(which)) => which.exit_code(),
        (None, None) => 0,
    }
}

/// Takes a VM down; a further signal makes a graceful stop a forced one.
async fn stop_interruptibly(
    node: &Node,
    vm: &VmHandle,
    mode: StopMode,
    interrupts: &mut Interrupts,
) -> Result<VmView, CliError> {
    let stopped = node.client().stop_vm(vm.id, mode);
    let stopped = tokio::select! {
        stopped = stopped => stopped,
        _ = interrupts.next() => node.client().stop_vm(vm.id, StopMode::Force).await,
    };
    match stopped {
        Ok(view) => Ok(view),
        // It had ended by itself before it could be asked.
        Err(failure) if failure.kind == FailureKind::NotFound => {
            let view = settled(vm.clone()).await?;
            match not_cleaned_up(&view) {
                None => Ok(view),
                Some(text) => Err(CliError::message(text)),
            }
        }
        Err(failure) => Err(failure.into()),
    }
}
