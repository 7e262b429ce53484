//! From `matchlock run` to its end: when the guest is ready, when its first command has ended, and what
//! of it is Matchlock's own; beside QEMU alone, started with the same arguments. What a command's
//! streams carry. Ends by writing target/bench/boot.md for `scenarios`, and docs/timeline.svg.
//! `make bench`.

#[path = "../artifacts/mod.rs"]
mod artifacts;
mod bare;
mod life;
#[path = "../samples/mod.rs"]
mod samples;
mod streams;
mod timeline;

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use matchlock_test_support::Installation;

use bare::Description;
use life::Life;
use samples::Samples;

const ROUNDS: usize = 15;

fn main() -> Result<()> {
    let load = load_average()?;
    let mut kernels = kernels()?;
    for round in 0..ROUNDS {
        for kernel in &mut kernels {
            kernel.round()?;
        }
        eprintln!("boot: round {} of {ROUNDS}", round + 1);
    }
    let lives: Vec<(&str, &Life)> =
        kernels.iter().filter_map(|kernel| Some((kernel.name, kernel.typical()?))).collect();
    let picture = timeline::svg(&lives)?;
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/timeline.svg");
    std::fs::write(&path, picture).with_context(|| path.display().to_string())?;

    let streams = streams::section(&kernels.first().context("no kernel")?.installation)?;
    let section = [
        "## From `run` to its end\n\n",
        &table(&kernels)?,
        "\nThe typical round of each (the one with the median of the whole time): \
         ![timeline](timeline.svg)\n\n",
        &streams,
        &format!("\nLoad average before all this: {load}; after it: {}.\n", load_average()?),
    ]
    .concat();
    let file = artifacts::section("boot");
    std::fs::create_dir_all(file.parent().context("a directory")?)?;
    std::fs::write(&file, &section)?;
    println!("{section}\nwritten to {} and {}", file.display(), path.display());
    Ok(())
}

fn load_average() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(", "))
}

/// One guest kernel, and what was measured with it.
struct Kernel {
    /// For the table.
    name: &'static str,
    release: String,
    /// With this kernel's bundle alone.
    installation: Installation,
    description: Description,
    lives: Vec<Life>,
    bare_ready: Samples,
    bare_first: Samples,
}

/// The kernels that are built: Debian's, and our own after `make kernel`.
fn kernels() -> Result<Vec<Kernel>> {
    let shared = Installation::new()?.bundles()?;
    let mut kernels = Vec::new();
    for name in ["stock", "own"] {
        // Bundles of earlier builds are there too.
        let current = artifacts::target().join("guest-bundle").join(format!("current-{name}"));
        let Ok(current) = std::fs::read_to_string(current) else { continue };
        let installed = shared.iter().find(|(version, ..)| version == current.trim());
        let (version, release, _) = installed.with_context(|| format!("no bundle {current}"))?;
        let installation = Installation::with_own_bundle(version)?;
        let description = Description::of_a_vm(&installation)?;
        kernels.push(Kernel {
            name,
            release: release.clone(),
            installation,
            description,
            lives: Vec::new(),
            bare_ready: Samples::default(),
            bare_first: Samples::default(),
        });
    }
    Ok(kernels)
}

impl Kernel {
    /// Matchlock and QEMU alone, one after the other: what slows one slows both.
    fn round(&mut self) -> Result<()> {
        self.lives.push(life::of_a_run(&self.installation)?);
        let bare = bare::boot(&self.description)?;
        self.bare_ready.push_ms(bare.ready);
        self.bare_first.push_ms(bare.first_command);
        Ok(())
    }

    fn samples(&self, what: impl Fn(&Life) -> f64) -> Samples {
        let mut samples = Samples::default();
        self.lives.iter().for_each(|life| samples.push(what(life)));
        samples
    }

    /// The life whose whole time is nearest to the median.
    fn typical(&self) -> Option<&Life> {
        let median = self.samples(|life| life.whole).median();
        let far = |life: &&Life| (life.whole - median).abs();
        self.lives.iter().min_by(|a, b| far(a).total_cmp(&far(b)))
    }
}

fn table(kernels: &[Kernel]) -> Result<String> {
    let mut text = format!(
        "`cargo bench --bench boot`: `matchlock run --no-network --image busybox -- true`, and by turns \
         QEMU alone: the arguments that the VM's `hypervisor.json` shows, spawned by the benchmark, its \
         agent spoken to over the same link. {ROUNDS} rounds. Milliseconds, median ± median absolute \
         deviation (least … most); the ratio is Matchlock to QEMU alone in one round. Matchlock's parts \
         are from the times of its own log (`MATCHLOCK_LOG=debug`): *ready* is from the spawn of QEMU \
         to the agent's answer, *first command* to the end of `true`, *before the spawn* from the \
         start of the program to QEMU's spawn, *after the end* from the end of `true` to the end of \
         the program, with nothing left.\n\n\
         | kernel | what | Matchlock | QEMU alone | ratio | goal |\n|---|---|---|---|---|---|\n"
    );
    for kernel in kernels {
        let name = format!("{} ({})", kernel.name, kernel.release);
        let (ready, first) = (kernel.samples(|l| l.ready), kernel.samples(|l| l.first_command));
        let compared = [
            ("ready", ready, &kernel.bare_ready, if kernel.name == "own" { "≤ 1.05×" } else { "" }),
            ("first command", first, &kernel.bare_first, ""),
        ];
        for (what, ours, bare, goal) in compared {
            let ratio = ours.combine(bare, |ours, bare| ours / bare).spread(2);
            writeln!(
                text,
                "| {name} | {what} | {} | {} | {ratio} | {goal} |",
                ours.spread(0),
                bare.spread(0)
            )?;
        }
        let own = [
            ("before the spawn", kernel.samples(|l| l.before_spawn), "≤ 20 ms"),
            ("after the end", kernel.samples(|l| l.after_end), "≤ 50 ms"),
            ("**the whole `run`**", kernel.samples(|l| l.whole), ""),
        ];
        for (what, samples, goal) in own {
            writeln!(text, "| {name} | {what} | {} | | | {goal} |", samples.spread(1))?;
        }
    }
    Ok(text)
}
