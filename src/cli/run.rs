//! `matchlock run`: boot a microVM, run a command in it, pass its exit code on, leave nothing.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use matchlock_actors::vm::{CreateVm, StartMode};
use matchlock_host::facts;
use matchlock_host::guest_bundle::GuestBundle;
use matchlock_host::image::BlobLease;
use matchlock_model::exec::{ExecSpec, Terminal};
use matchlock_model::image::ImageRecord;
use matchlock_model::spec::{EnvVar, NetworkInput, VmSpec, VmSpecInput, env_file_lines, parse_env};
use matchlock_model::vm::StopMode;
use tokio::time::timeout;

use super::error::CliError;
use super::later::LaterRunFlags;
use super::number;
use super::progress;
use super::pull;
use super::render;
use super::timings::Stopwatch;
use super::vm_life::in_vm;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::detach::{self, Asker, Detached};
use crate::node::images::Chosen;
use crate::node::owner::{self, KillRequest};
use crate::node::relay::SOON;
use crate::node::signals::Interrupts;
use crate::node::terminal;

/// The arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: the command's own; 124 --timeout passed; 125 matchlock failed; 126 the command cannot
be executed; 127 it was not found; 128+n it was ended by signal n; 130, 143 or 129 when run itself
was interrupted by SIGINT, SIGTERM or SIGHUP, whatever the command made of the signal. With --rm=false
the command's own code comes once the VM has been ended.

Examples:
  matchlock run --image busybox -- sh -c 'exit 7'; echo $?
  matchlock run --image debian:12 --pull -- cat /etc/os-release
  matchlock run --image busybox -e WHO=world -- sh -c 'echo hello $WHO'
  matchlock run --image busybox -w /tmp -u 1000 -- sh -c 'pwd; id -u'
  matchlock run -i --image busybox -- sha256sum < file
  matchlock run -it --image busybox         (a shell)
  matchlock run --rm=false --image busybox  (until a signal or `matchlock kill`)
  vm=$(matchlock run -d --image busybox -- sleep 1000)
  matchlock exec $vm -- ps; matchlock kill $vm")]
pub(super) struct RunArgs {
    /// Image to run: a tag that `matchlock image ls` lists, or the name of an image in a registry,
    /// which is pulled if it is not here: debian:12, ghcr.io/owner/name@sha256:...
    #[arg(long)]
    image: String,
    #[command(flatten)]
    pull: pull::RunFlags,
    /// Remove the VM when its command has ended; --rm=false keeps it until a signal [default: true,
    /// with --detach false]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    rm: Option<bool>,
    /// Print the VM's id once the command has started, and leave it running in the background
    #[arg(short, long)]
    detach: bool,
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
    #[arg(long, default_value_t = 1.0, value_parser = number::fraction)]
    cpus: f64,
    /// Memory in MB
    #[arg(long, default_value_t = 512, value_name = "MB", value_parser = number::whole)]
    memory: u64,
    /// Writable disk in MB; it takes space only as it fills
    #[arg(long, default_value_t = 5120, value_name = "MB", value_parser = number::whole)]
    disk_size: u64,
    /// How long the command may take, e.g. 90s, 1h30m, or seconds
    #[arg(long, value_name = "DURATION", value_parser = number::duration)]
    timeout: Option<Duration>,
    /// How long a stop waits for the guest, e.g. 10s, 500ms, or seconds
    #[arg(long, value_name = "DURATION", value_parser = number::duration)]
    graceful_shutdown: Option<Duration>,
    /// Give the command our stdin
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal; with -i it is ours: keys, Ctrl-C and size go to the guest
    #[arg(short, long)]
    tty: bool,
    /// Leave the guest's root all its rights. Nothing is taken from it yet, so this changes nothing
    /// yet
    #[arg(long)]
    privileged: bool,
    /// No NIC at all: needs no privilege
    #[arg(long)]
    no_network: bool,
    /// Largest packet in bytes, on both ends [default: 1500]
    #[arg(long, value_name = "BYTES", value_parser = number::whole)]
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
    /// Hypervisor [default: auto, or as MATCHLOCK_HYPERVISOR says]
    #[arg(long, value_enum)]
    hypervisor: Option<HypervisorChoice>,
    /// Guest kernel, an ELF file with a PVH entry [default: the guest bundle's, or as MATCHLOCK_KERNEL
    /// says]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Boot, also where there is a snapshot to start from, and make none (see `matchlock warm`)
    #[arg(long)]
    cold: bool,
    /// Print how long each step took
    #[arg(long)]
    timings: bool,
    #[command(flatten)]
    later: LaterRunFlags,
    /// Command and its arguments (default: the image's own)
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Says which hypervisor, where no flag does.
const HYPERVISOR_VARIABLE: &str = "MATCHLOCK_HYPERVISOR";

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

/// The flag, or the environment.
fn hypervisor(flag: Option<HypervisorChoice>) -> Result<HypervisorChoice, CliError> {
    let set = std::env::var_os(HYPERVISOR_VARIABLE).filter(|value| !value.is_empty());
    match (flag, set) {
        (Some(choice), _) => Ok(choice),
        (None, None) => Ok(HypervisorChoice::Auto),
        (None, Some(value)) => {
            let known = HypervisorChoice::from_str(&value.to_string_lossy(), false);
            known.map_err(|_| {
                CliError::input(format_args!(
                    "{HYPERVISOR_VARIABLE} is {value:?}: use auto or qemu, or unset it"
                ))
            })
        }
    }
}

pub(super) async fn run(args: RunArgs, config: NodeConfig) -> Result<u8, CliError> {
    let mut watch = Stopwatch::start();
    let timings = args.timings;
    let start = if args.cold { StartMode::Cold } else { StartMode::Warm };
    let own_kernel = args.kernel.clone();
    let asker = Asker::of_this_process()?;
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let detach = args.detach && asker.is_none();
    let mut config = config;
    let how = args.pull.take_in(&mut config)?;
    let spec = check(args)?;
    let image = match asker.as_ref().and_then(Asker::image) {
        Some(chosen) => chosen.find(&config)?,
        None => match pull::for_run(&config, &spec.image, how, &mut interrupts).await? {
            Ok(image) => image,
            Err(which) => return Ok(which.exit_code()),
        },
    };
    let command = own_command(&spec, &image)?;
    let kernel = own_kernel.map(std::path::absolute).transpose();
    let kernel = kernel.map_err(|e| CliError::failure(&e))?.or_else(|| config.kernel.clone());
    let (bundle, guest_lease) =
        GuestBundle::find_leased(&config.cache, kernel).map_err(|e| CliError::failure(&e))?;
    let lease = BlobLease::take(image.rootfs_path.as_ref()).map_err(|e| CliError::failure(&e))?;
    if detach {
        return detached(&config, &Chosen::from(&image), &mut interrupts).await;
    }
    if spec.network.is_some() {
        config.subnet_pool.as_ref().map_err(|e| CliError::failure(e))?;
    }
    // The database may be somebody else's for a while, and nothing is made yet.
    let mut booting = tokio::spawn(Node::boot(config));
    let node = tokio::select! {
        node = &mut booting => node.map_err(|e| CliError::failure(&e))??,
        which = interrupts.next() => {
            // It may be half-way through making the database.
            if let Ok(node) = timeout(SOON, booting).await {
                let node = node.map_err(|e| CliError::failure(&e))??;
                node.shutdown(StopMode::Force).await?;
            }
            return Ok(which.exit_code());
        }
    };
    node.deps().hypervisor.check().map_err(|e| CliError::failure(&e))?;
    watch.image = Some(watch.elapsed());
    let create = CreateVm {
        spec: spec.clone(),
        image: image.config,
        base_disk: image.rootfs_path.into(),
        lease: Some(lease),
        guest_lease: guest_lease.map(Arc::new),
        kernel: bundle.kernel,
        initramfs: bundle.initramfs,
        start,
    };
    let untold = asker.as_ref().map(Asker::told);
    let result = in_vm(&node, create, &spec, command, asker, &mut interrupts, &mut watch).await;
    if let Ok((_, view)) = &result
        && untold.is_some_and(|untold| !untold.is_cancelled())
        && let Err(failure) = node.client().want_removal(view.id).await
    {
        // Interrupted before anybody was told its id.
        render::error(&CliError::message(format_args!("VM {} stays listed: {failure}", view.id)));
    }
    // Among them this VM, if it was to be removed while it ran.
    node.finish_removals().await;
    let shutdown = node.shutdown(StopMode::Force).await;
    let (code, view) = result?;
    shutdown?;
    if timings {
        watch.print(&view.timings, spec.network.is_some());
    }
    Ok(code)
}

/// How long the owner of a VM of which nobody knows may take to hear that it is to go, and to end it.
const HEARS: Duration = Duration::from_secs(5);
const ENDS: Duration = Duration::from_secs(30);

/// Has another process own the VM; prints its id once the command runs.
async fn detached(
    config: &NodeConfig,
    image: &Chosen,
    interrupts: &mut Interrupts,
) -> Result<u8, CliError> {
    let started = progress::waiting("starting a VM", detach::start(image, interrupts)).await?;
    match started {
        Detached::Started(id) => match render::line_for_somebody(&id.to_string()) {
            Ok(()) => Ok(0),
            // Nobody would know of it.
            Err(error) => {
                let how = KillRequest { force: true, heard: Some(HEARS), done: Some(ENDS) };
                let ended = match owner::kill(&config.vms_dir(), id, how).await {
                    Ok(()) => "it was taken down again".to_owned(),
                    Err(failure) => {
                        format!("it could not be taken down: {failure}; run `matchlock kill {id}`")
                    }
                };
                Err(CliError::message(format_args!(
                    "could not print the id of VM {id}: {error}; {ended}"
                )))
            }
        },
        Detached::Ended(status) => Ok(detach::exit_code(status, interrupts.first())?),
    }
}

fn check(args: RunArgs) -> Result<VmSpec, CliError> {
    args.later.refuse()?;
    let attached = [("--interactive", args.interactive), ("--timings", args.timings)];
    if let Some((flag, _)) = attached.iter().find(|(_, given)| args.detach && *given) {
        return Err(CliError::input(format_args!("--detach cannot be combined with {flag}")));
    }
    let terminal = own_terminal(args.interactive, args.tty)?;
    if hypervisor(args.hypervisor)? == HypervisorChoice::Firecracker {
        return Err(CliError::input(
            "the hypervisor firecracker is not available in this version yet; use --hypervisor auto \
             or qemu, or unset MATCHLOCK_HYPERVISOR",
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
        timeout: args.timeout,
        graceful_shutdown: args.graceful_shutdown,
        stdin: args.interactive,
        terminal,
        privileged: args.privileged,
        remove: args.rm.unwrap_or(!args.detach),
        host_cpus: u32::try_from(host_cpus).unwrap_or(u32::MAX),
    })
    .map_err(CliError::input)
}

/// The terminal that a command gets (`-t`). With `-i` it stands for ours, so there must be one.
pub(super) fn own_terminal(stdin: bool, tty: bool) -> Result<Option<Terminal>, CliError> {
    if stdin && tty && !terminal::is_stdin() {
        return Err(CliError::input(
            "the input device is not a TTY: -it requires a TTY as stdin; use -i alone for a pipe",
        ));
    }
    Ok(tty.then(terminal::like_ours))
}

/// The variables of the files, in order, then those of the command line.
pub(super) fn environment(files: &[PathBuf], given: &[String]) -> Result<Vec<EnvVar>, CliError> {
    let lookup = |name: &str| std::env::var_os(name).map(OsStringExt::into_vec);
    let mut env = Vec::new();
    for file in files {
        let name = file.display();
        let bytes = std::fs::read(file)
            .map_err(|e| CliError::input(format_args!("could not read --env-file {name}: {e}")))?;
        let text = std::str::from_utf8(&bytes).map_err(|e| {
            let valid = bytes.get(..e.valid_up_to()).unwrap_or_default();
            let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
            CliError::input(format_args!("--env-file {name}, line {line}: not valid UTF-8"))
        })?;
        for (number, line) in env_file_lines(text) {
            env.push(parse_env(line, &lookup).map_err(|e| {
                CliError::input(format_args!("--env-file {name}, line {number}: {e}"))
            })?);
        }
    }
    for text in given {
        env.push(parse_env(text, &lookup).map_err(CliError::input)?);
    }
    Ok(env)
}

/// The VM's own command; none is needed for a VM that is kept.
fn own_command(spec: &VmSpec, image: &ImageRecord) -> Result<Option<ExecSpec>, CliError> {
    match spec.command(&image.config) {
        Ok(command) => Ok(Some(command)),
        Err(matchlock_model::spec::SpecError::NoCommand { .. }) if !spec.ephemeral => Ok(None),
        Err(error) => Err(CliError::input(error)),
    }
}
