//! Images: a pull against `skopeo copy` and `umoci unpack` of the same image, what a known image adds to
//! `run`, and whether a VM's creation depends on the size of its image. Ends by writing
//! target/bench/images.md for `scenarios`. `make bench`.

mod artifacts;
mod samples;

use std::fmt::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use matchlock_test_support::{Installation, busybox_archive, wait_until};
use samples::Samples;

const ROUNDS: usize = 5;
/// Of VMs on the small and on the large image.
const CREATIONS: usize = 15;
/// The size of the large image's one file, which does not compress.
const LARGE_MB: u64 = 2048;

fn main() -> Result<()> {
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let place = tempfile::tempdir()?;
    let registry = Registry::start(place.path())?;
    let section = [
        "\n## Images\n\n`cargo bench --bench images`: the real program, Debian's `docker-registry` on \
         loopback, the Debian of `scripts/debian-image.sh`.\n\n",
        &pulls(&registry, place.path())?,
        &creations(place.path())?,
        &format!("\nLoad average before all this: {}.\n", load.trim()),
    ]
    .concat();
    let file = artifacts::section("images");
    std::fs::create_dir_all(file.parent().context("a directory")?)?;
    std::fs::write(&file, &section)?;
    println!("{section}\nwritten to {}", file.display());
    Ok(())
}

fn done(command: &mut Command) -> Result<Duration> {
    let began = Instant::now();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let took = began.elapsed();
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(took)
}

/// A registry that ends with us.
struct Registry {
    process: Child,
    host: String,
}

impl Registry {
    fn start(place: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = place.join("registry.yml");
        let data = place.join("registry");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
                 http: {{addr: '127.0.0.1:{port}'}}\n",
                data.display()
            ),
        )?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("docker-registry: run scripts/setup.sh")?;
        let registry = Self { process, host: format!("127.0.0.1:{port}") };
        let is_up = || Ok(TcpStream::connect(("127.0.0.1", port)).is_ok());
        wait_until(Duration::from_secs(30), "the registry", is_up)?;
        Ok(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait().map(drop)) {
            eprintln!("could not end the registry: {error}");
        }
    }
}

/// An OCI layout with one image of these files; `umoci` packs them.
fn layout(place: &Path, name: &str, rootfs_tar: &Path) -> Result<PathBuf> {
    let layout = place.join(name);
    let image = format!("{}:latest", layout.display());
    done(Command::new("umoci").args(["init", "--layout"]).arg(&layout))?;
    done(Command::new("umoci").args(["new", "--image", &image]))?;
    done(Command::new("umoci").args(["raw", "add-layer", "--image", &image]).arg(rootfs_tar))?;
    Ok(layout)
}

/// The files of the Debian that `scripts/debian-image.sh` makes.
fn debian() -> Result<PathBuf> {
    Ok(busybox_archive()?.with_file_name("debian.tar"))
}

fn pulls(registry: &Registry, place: &Path) -> Result<String> {
    let layout = layout(place, "debian", &debian()?)?;
    let name = format!("{}/debian:12", registry.host);
    let remote = format!("docker://{name}");
    done(
        Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(&remote),
    )?;
    let installation = Installation::without_images()?;
    let pull = |cache: &Path| -> Result<Command> {
        let mut command =
            installation.command(&["pull", "--insecure-registry", &registry.host, &name])?;
        command.env("MATCHLOCK_CACHE", cache);
        Ok(command)
    };
    let (mut ours, mut theirs, mut again) =
        (Samples::default(), Samples::default(), Samples::default());
    for round in 0..ROUNDS {
        let cache = place.join(format!("cache-{round}"));
        std::fs::create_dir(&cache)?;
        ours.push_ms(done(&mut pull(&cache)?)?);
        again.push_ms(done(&mut pull(&cache)?)?);
        std::fs::remove_dir_all(&cache)?;

        let (copy, bundle) = (place.join("copy"), place.join("bundle"));
        let began = Instant::now();
        done(
            Command::new("skopeo")
                .args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", &remote])
                .arg(format!("oci:{}:latest", copy.display())),
        )?;
        done(
            Command::new("umoci")
                .args(["unpack", "--image"])
                .arg(format!("{}:latest", copy.display()))
                .arg(&bundle),
        )?;
        theirs.push_ms(began.elapsed());
        std::fs::remove_dir_all(&copy)?;
        std::fs::remove_dir_all(&bundle)?;
    }
    let mut text = String::from("| | ms |\n|---|---|\n");
    let rows = [
        ("`matchlock pull`: download and build of the root filesystem", &ours),
        ("`skopeo copy` and `umoci unpack` of the same", &theirs),
        ("`matchlock pull` of what is here already", &again),
    ];
    for (what, took) in rows {
        writeln!(text, "| {what} | {} |", took.spread(0))?;
    }
    writeln!(
        text,
        "\nRatio of the first two in each of {ROUNDS} interleaved rounds: {} (goal ≤ 1.0). Median ± median \
         absolute deviation (least … most), here and below.\n",
        ours.combine(&theirs, |ours, theirs| ours / theirs).spread(2)
    )?;
    Ok(text)
}

/// What `run --timings` says of these steps, in milliseconds.
fn steps(installation: &Installation, image: &str) -> Result<[f64; 2]> {
    let args = ["run", "--timings", "--no-network", "--image", image, "--", "true"];
    let output = installation.output(&args)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}");
    let step = |name: &str| -> Result<f64> {
        for line in said.lines() {
            let line = line.trim_start_matches("matchlock: ");
            if let Some(rest) = line.strip_prefix(name)
                && let Some((value, _)) = rest.split_once(" ms")
                && let Ok(value) = value.trim().parse()
            {
                return Ok(value);
            }
        }
        bail!("run --timings did not say {name}: {said}")
    };
    Ok([step("image ")?, step("to spawned ")?])
}

/// The same busybox with and without a large file beside it.
fn creations(place: &Path) -> Result<String> {
    let installation = Installation::without_images()?;
    let import = |tag: &str, archive: &Path| -> Result<()> {
        let mut command = installation.command(&["image", "import", tag])?;
        command.stdin(std::fs::File::open(archive)?);
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    import("small", &busybox_archive()?)?;
    let layout = layout(place, "large", &noise(place)?)?;
    let archive = place.join("large.oci.tar");
    done(Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&archive).arg("."))?;
    import("large", &archive)?;
    // What was written for the images must not be in the way of what is measured.
    rustix::fs::sync();
    let (mut small, mut large) = (<[Samples; 2]>::default(), <[Samples; 2]>::default());
    for round in 0..=CREATIONS {
        let took = [steps(&installation, "small")?, steps(&installation, "large")?];
        // The first of each warms the page cache.
        if round > 0 {
            for (samples, took) in [&mut small, &mut large].into_iter().zip(took) {
                samples.iter_mut().zip(took).for_each(|(samples, took)| samples.push(took));
            }
        }
    }
    let mut text = String::from(
        "| `run` from its start until | small image, ms | image of 2 GB, ms | ratio | goal |\n\
         |---|---|---|---|---|\n",
    );
    let whats = [
        ("the image is found and the node is up", "≤ 10 ms"),
        ("the hypervisor is started", "≤ 1.1×"),
    ];
    for (((what, goal), small), large) in whats.into_iter().zip(&small).zip(&large) {
        let ratio = large.combine(small, |large, small| large / small).spread(2);
        writeln!(
            text,
            "| {what} | {} | {} | {ratio} | {goal} |",
            small.spread(1),
            large.spread(1)
        )?;
    }
    writeln!(text, "\n{CREATIONS} interleaved runs.")?;
    Ok(text)
}

/// Busybox's files and a large one.
fn noise(place: &Path) -> Result<PathBuf> {
    let root = place.join("large-root");
    std::fs::create_dir_all(root.join("bin"))?;
    std::fs::copy("/usr/bin/busybox", root.join("bin/busybox"))?;
    for name in ["sh", "true"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    let mut random = std::io::Read::take(std::fs::File::open("/dev/urandom")?, LARGE_MB << 20);
    std::io::copy(&mut random, &mut std::fs::File::create(root.join("large"))?)?;
    let tar = place.join("large-root.tar");
    done(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."))?;
    std::fs::remove_dir_all(&root)?;
    Ok(tar)
}
