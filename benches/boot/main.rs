//! From `matchlock run` to its end: when the guest is ready, when its first command has ended, and what
//! of it is Matchlock's own; beside QEMU alone, started with the same arguments. What a command's
//! streams carry. Ends by writing target/bench/boot.md for `scenarios`, and docs/timeline.svg.
//! `make bench`.

#[path = "../artifacts/mod.rs"]
mod artifacts;
mod bare;
#[path = "../kernels/mod.rs"]
mod kernels;
mod life;
#[path = "../samples/mod.rs"]
mod samples;
mod streams;
mod timeline;

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use bare::Description;
use kernels::GuestKernel;
use life::{Life, Start};
use matchlock_test_support::Installation;
use samples::Samples;

const ROUNDS: usize = 15;

fn main() -> Result<()> {
    let load = load_average()?;
    let kernels = kernels::built()?.into_iter().map(prepare);
    let mut kernels = kernels.collect::<Result<Vec<_>>>()?;
    for round in 0..ROUNDS {
        for kernel in &mut kernels {
            kernel.round()?;
        }
        eprintln!("boot: round {} of {ROUNDS}", round + 1);
    }
    let mut lives = Vec::new();
    for kernel in &kernels {
        for of in [&kernel.cold, &kernel.warm] {
            let life = of.lives.typical().context("no life")?;
            lives.push((format!("{} kernel, {}", kernel.guest.name, of.start.name()), life));
        }
    }
    let picture = timeline::svg(&lives)?;
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/timeline.svg");
    std::fs::write(&path, picture).with_context(|| path.display().to_string())?;

    let streams = streams::section(kernels.iter().map(|kernel| &kernel.guest))?;
    let section = [
        "## From `run` to its end\n\n",
        &table(&kernels)?,
        kernels::not_measured(kernels.iter().map(|kernel| &kernel.guest)),
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

/// What was measured with one guest kernel.
struct Kernel {
    guest: GuestKernel,
    cold: Compared,
    /// From a snapshot.
    warm: Compared,
}

/// Machines that begin in one way: Matchlock's, and QEMU alone.
struct Compared {
    start: Start,
    description: Description,
    lives: Lives,
    bare_ready: Samples,
    bare_first: Samples,
}

fn prepare(guest: GuestKernel) -> Result<Kernel> {
    let cold = Compared::new(Start::Cold, &guest.installation)?;
    let warmed = guest.installation.output(&["warm", "--no-network"])?;
    ensure!(warmed.status.success(), "{}", String::from_utf8_lossy(&warmed.stderr));
    let warm = Compared::new(Start::Warm, &guest.installation)?;
    Ok(Kernel { guest, cold, warm })
}

impl Kernel {
    fn round(&mut self) -> Result<()> {
        self.cold.round(&self.guest.installation)?;
        self.warm.round(&self.guest.installation)
    }
}

impl Compared {
    fn new(start: Start, installation: &Installation) -> Result<Self> {
        Ok(Self {
            start,
            description: Description::of_a_vm(installation)?,
            lives: Lives::default(),
            bare_ready: Samples::default(),
            bare_first: Samples::default(),
        })
    }

    /// Matchlock and QEMU alone, one after the other: what slows one slows both.
    fn round(&mut self, installation: &Installation) -> Result<()> {
        self.lives.0.push(life::of_a_run(installation, self.start)?);
        let bare = bare::start(&self.description)?;
        self.bare_ready.push_ms(bare.ready);
        self.bare_first.push_ms(bare.first_command);
        Ok(())
    }
}

#[derive(Default)]
struct Lives(Vec<Life>);

impl Lives {
    fn samples(&self, what: impl Fn(&Life) -> f64) -> Samples {
        let mut samples = Samples::default();
        self.0.iter().for_each(|life| samples.push(what(life)));
        samples
    }

    /// The life whose whole time is nearest to the median.
    fn typical(&self) -> Option<&Life> {
        let median = self.samples(|life| life.whole).median();
        let far = |life: &&Life| (life.whole - median).abs();
        self.0.iter().min_by(|a, b| far(a).total_cmp(&far(b)))
    }
}

fn table(kernels: &[Kernel]) -> Result<String> {
    let mut text = format!(
        "`cargo bench --bench boot`: `matchlock run --no-network --image busybox -- true`, with \
         `--cold` and from the snapshot of `matchlock warm`, and by turns QEMU alone: the arguments \
         that the VM's `hypervisor.json` shows, spawned by the benchmark (by way of `setpriv`), from the \
         same snapshot where it is warm (without a look at its bytes), its agent spoken to over the same link. {ROUNDS} rounds. Milliseconds, median ± median absolute \
         deviation (least … most); the ratio is Matchlock to QEMU alone in one round. Matchlock's parts \
         are from the times of its own log (`MATCHLOCK_LOG=debug`): *ready* is from the beginning of \
         the launch to the agent's answer, *first command* to the VM's stop, *before the spawn* from the \
         start of the program to the launch (QEMU's sockets and description, some 3 ms, come after it), \
         *after the end* from the VM's stop, which follows the command's end, to the end of the program, \
         with nothing left.\n\n\
         | kernel | what | Matchlock | QEMU alone | ratio | goal |\n|---|---|---|---|---|---|\n"
    );
    for kernel in kernels {
        rows(&mut text, &kernel.guest, &kernel.cold)?;
        rows(&mut text, &kernel.guest, &kernel.warm)?;
    }
    Ok(text)
}

/// The rows of machines that begin in one way.
fn rows(text: &mut String, guest: &GuestKernel, of: &Compared) -> Result<()> {
    let Compared { start, lives, .. } = of;
    let (kernel, start_name) = (guest.title(), start.name());
    let is_own = guest.name == "own";
    let ready_goal = if is_own && *start == Start::Cold { "≤ 1.05×" } else { "" };
    let whole_goal = if *start == Start::Warm { "≤ 450 ms" } else { "" };
    let compared = [
        ("ready", lives.samples(|l| l.ready), &of.bare_ready, ready_goal),
        ("first command", lives.samples(|l| l.first_command), &of.bare_first, ""),
    ];
    for (what, ours, bare, goal) in compared {
        let ratio = ours.combine(bare, |ours, bare| ours / bare).spread(2);
        let (ours, bare) = (ours.spread(0), bare.spread(0));
        writeln!(text, "| {kernel} | {start_name}: {what} | {ours} | {bare} | {ratio} | {goal} |")?;
    }
    let own = [
        ("before the spawn", lives.samples(|l| l.before_spawn), "≤ 20 ms"),
        ("after the end", lives.samples(|l| l.after_end), "≤ 50 ms"),
        ("**the whole `run`**", lives.samples(|l| l.whole), whole_goal),
    ];
    for (what, samples, goal) in own {
        let spread = samples.spread(1);
        writeln!(text, "| {kernel} | {start_name}: {what} | {spread} | | | {goal} |")?;
    }
    Ok(())
}
