//! `matchlock pull`, and the pull that `run` begins with when its image is not here.
//!
//! # On a signal
//! The first one cancels: what was downloaded stays for the next pull, and `gc` removes it. A second
//! one does not wait for the answer.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use matchlock_actors::images::Pulled;
use matchlock_host::image::{ImportProgress, PullProgress, PullRequest};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::ImageRecord;
use matchlock_model::platform::Platform;
use matchlock_model::reference::ImageReference;
use matchlock_model::vm::StopMode;
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::progress::{Elsewhere, Progress};
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::config::registries::is_host;
use crate::node::images::{find_image, look_up, runnable};
use crate::node::signals::{Interrupt, Interrupts};

/// The arguments of `pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
An image is named as Docker names it: alpine is docker.io/library/alpine:latest. Logins of
`docker login` are used. What was downloaded is kept as long as the image is here, for others
that share it.

Exit codes: 0; 1 it could not be pulled; 2 usage; 130, 143 or 129 when it was interrupted: what
has come stays for the next pull, and `matchlock gc` removes it.

Examples:
  matchlock pull debian:12
  matchlock pull ghcr.io/owner/name@sha256:...
  matchlock pull --insecure-registry localhost:5000 localhost:5000/tools:1.2")]
pub(super) struct PullArgs {
    /// Image: [HOST[:PORT]/]NAME[:TAG] or [HOST[:PORT]/]NAME@sha256:DIGEST
    image: String,
    /// Platform, e.g. linux/arm64; only images of this host's own can be run [default: this host's]
    #[arg(long)]
    platform: Option<String>,
    /// Registry to ask by plain HTTP, may be repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    insecure_registry: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// The flags of `run` that are about pulling.
#[derive(Debug, Default, Args)]
pub(super) struct RunFlags {
    /// When to pull the image [default: missing; bare --pull means always]
    #[arg(
        long,
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "always",
        value_name = "WHEN"
    )]
    pull: Option<Policy>,
    /// Platform of an image that is pulled; only this host's own can be run, e.g. linux/amd64/v2
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<String>,
    /// Registry to ask by plain HTTP, may be repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    insecure_registry: Vec<String>,
}

/// When `run` pulls its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Policy {
    /// Each time: the registry may have another one by now
    Always,
    /// If it is not here
    Missing,
    /// Not at all
    Never,
}

impl RunFlags {
    /// Gives the configuration what was said of registries; when to pull, and for which platform.
    pub(super) fn take_in(
        &self,
        config: &mut NodeConfig,
    ) -> Result<(Policy, Option<Platform>), CliError> {
        allow_insecure(config, &self.insecure_registry)?;
        let platform = self.platform.as_deref().map(platform).transpose()?;
        let host = Platform::host();
        if let Some(other) = platform.as_ref().filter(|it| it.architecture != host.architecture) {
            return Err(CliError::input(format_args!(
                "--platform {other}: this host runs images for {host} only"
            )));
        }
        Ok((self.pull.unwrap_or(Policy::Missing), platform))
    }
}

fn platform(text: &str) -> Result<Platform, CliError> {
    text.parse().map_err(|e| CliError::input(format_args!("--platform {e}")))
}

fn allow_insecure(config: &mut NodeConfig, hosts: &[String]) -> Result<(), CliError> {
    if let Some(bad) = hosts.iter().find(|host| !is_host(host)) {
        return Err(CliError::input(format_args!(
            "--insecure-registry {bad:?}: write HOST or HOST:PORT, without a scheme and a path"
        )));
    }
    config.registries.insecure.extend_from_slice(hosts);
    Ok(())
}

#[derive(Debug, Serialize)]
struct JsonPulled<'a> {
    image: &'a str,
    digest: &'a str,
    platform: Option<&'a str>,
    layers: usize,
    size: u64,
    new: bool,
}

pub(super) async fn pull(args: PullArgs, mut config: NodeConfig) -> Result<u8, CliError> {
    let image: ImageReference = args.image.parse().map_err(CliError::input)?;
    let platform = args.platform.as_deref().map(platform).transpose()?;
    allow_insecure(&mut config, &args.insecure_registry)?;
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let pulled = match one(config, PullRequest { image, platform }, &mut interrupts).await? {
        Ok(pulled) => pulled,
        Err(which) => {
            render::note(
                "interrupted; what was downloaded is kept for the next pull, `matchlock gc` removes it",
            );
            return Ok(which.exit_code());
        }
    };
    let record = &pulled.record;
    if args.json {
        render::json(&JsonPulled {
            image: &record.tag,
            digest: &record.digest,
            platform: Some(&*record.config.platform).filter(|other| !other.is_empty()),
            layers: pulled.layers,
            size: record.size,
            new: pulled.is_new,
        })?;
        return Ok(0);
    }
    let word = if pulled.is_new { "Pulled" } else { "Up to date" };
    render::lines([
        format!("{word}: {}", record.tag),
        format!("Digest: {}", record.digest),
        format!("Layers: {}", pulled.layers),
        format!("Size: {}", render::megabytes(record.size)),
    ])?;
    Ok(0)
}

/// The image of a `run`, pulled if it has to be; or what interrupted that.
pub(super) async fn for_run(
    config: &NodeConfig,
    name: &str,
    (policy, platform): (Policy, Option<Platform>),
    interrupts: &mut Interrupts,
) -> Result<Result<ImageRecord, Interrupt>, CliError> {
    match policy {
        Policy::Never => return Ok(Ok(find_image(config, name)?)),
        Policy::Missing => {
            if let Some(image) = look_up(config, name)? {
                return Ok(Ok(image));
            }
        }
        Policy::Always => {}
    }
    let image = name.parse().map_err(CliError::input)?;
    let request = PullRequest { image, platform };
    Ok(match one(config.clone(), request, interrupts).await? {
        Ok(pulled) => Ok(runnable(pulled.record)?),
        Err(which) => Err(which),
    })
}

/// Pulls one image with a node of its own.
async fn one(
    config: NodeConfig,
    request: PullRequest,
    interrupts: &mut Interrupts,
) -> Result<Result<Pulled, Interrupt>, CliError> {
    let node = Node::boot(config).await?;
    let pulled = interruptible(&node, request, interrupts).await;
    node.shutdown(StopMode::Force).await?;
    match interrupts.first() {
        Some(which) => Ok(Err(which)),
        None => Ok(Ok(pulled?)),
    }
}

async fn interruptible(
    node: &Node,
    request: PullRequest,
    interrupts: &mut Interrupts,
) -> Result<Pulled, Failure> {
    let cancel = CancellationToken::new();
    let (tell, told) = watch::channel(None);
    let shown = Shown::begin(&request.image.to_string());
    let tell = Arc::new(move |step| drop(tell.send_replace(Some(step))));
    let pulling = node.client().pull_image(request, tell, cancel.clone());
    let mut pulling = std::pin::pin!(pulling);
    let mut showing = std::pin::pin!(shown.follow(told));
    tokio::select! {
        pulled = &mut pulling => return pulled,
        () = &mut showing => {}
        _ = interrupts.next() => cancel.cancel(),
    }
    tokio::select! {
        pulled = &mut pulling => pulled,
        _ = interrupts.next() => {
            Err(Failure::new(FailureKind::Cancelled, "the pull was interrupted"))
        }
    }
}

/// What is shown of a pull.
struct Shown {
    name: String,
    shown: Option<Progress>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Asking,
    Downloading,
    Waiting,
    Building,
}

impl Shown {
    fn begin(name: &str) -> Self {
        let first = format!("pulling {name}...");
        let shown = Some(Progress::steps(&first, Elsewhere::Lines));
        Self { name: name.to_owned(), shown, stage: Stage::Asking }
    }

    /// Shows each step, until there are no more.
    async fn follow(mut self, mut told: watch::Receiver<Option<PullProgress>>) {
        while told.changed().await.is_ok() {
            let step = told.borrow_and_update().clone();
            if let Some(step) = step {
                self.step(&step);
            }
        }
        // The line goes before anything else is written.
        drop(self.shown.take());
        std::future::pending::<()>().await;
    }

    fn step(&mut self, step: &PullProgress) {
        match step {
            PullProgress::Downloading { bytes, of } => {
                if self.enters(Stage::Downloading) {
                    let text = format!("downloading {} ({})", self.name, render::megabytes(*of));
                    self.shown = Some(Progress::bytes(&text, Some(*of), Elsewhere::Lines));
                }
                if let Some(shown) = &self.shown {
                    shown.count(*bytes, *of);
                }
            }
            PullProgress::Waiting => {
                if self.enters(Stage::Waiting) {
                    let text = format!("waiting for another process that builds {}", self.name);
                    self.shown = Some(Progress::steps(&text, Elsewhere::Lines));
                }
            }
            PullProgress::Building(ImportProgress::Layer { .. } | ImportProgress::Building) => {
                if self.enters(Stage::Building) {
                    let text = format!("building {}", self.name);
                    self.shown = Some(Progress::steps(&text, Elsewhere::Lines));
                }
            }
            PullProgress::Building(ImportProgress::LeftOut { what }) => {
                render::note(&format!("left out of {}: {what}", self.name));
            }
            PullProgress::Building(_) => {}
        }
    }

    /// Whether a stage begins; then what was shown of the one before is gone.
    fn enters(&mut self, stage: Stage) -> bool {
        let begins = self.stage != stage;
        if begins {
            self.stage = stage;
            drop(self.shown.take());
        }
        begins
    }
}
