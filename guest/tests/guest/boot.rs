//! Boots a real kernel with the guest bundle under QEMU and works with it over its link.
//!
//! Run by hand, after `make guest`: `cargo test -p matchlock-guest --test guest boot:: -- --ignored
//! --nocapture --test-threads=1`. `MATCHLOCK_TEST_BUNDLE` names another bundle than the current one.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use matchlock_wire::message::{
    Configure, ExecInput, ExecOutput, ExitStatus, Reply, Request, Shutdown,
};
use tempfile::TempDir;
use tokio::net::UnixStream;

use super::sessions::torn;
use super::support::{Host, block_on, in_time, start};

/// A machine that is killed when the test ends, however it ends.
struct Machine {
    qemu: Child,
    directory: TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let console = fs::read_to_string(self.directory.path().join("console.log"));
        println!("console: {console:?}");
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }
}

fn bundle() -> PathBuf {
    if let Some(bundle) = std::env::var_os("MATCHLOCK_TEST_BUNDLE") {
        return bundle.into();
    }
    let bundles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest-bundle");
    let current = fs::read_to_string(bundles.join("current")).expect("run make guest");
    bundles.join(current.trim())
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
}

fn tsc_khz() -> u64 {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = cpus.lines().find(|line| line.starts_with("cpu MHz"));
    let mhz = line.and_then(|line| line.split(": ").nth(1)).unwrap();
    mhz.replace('.', "").parse().unwrap()
}

/// An image of nothing but `setup`, and an empty writable layer.
fn disks(directory: &Path, setup: impl FnOnce(&Path)) {
    let image = directory.join("image");
    fs::create_dir(&image).unwrap();
    setup(&image);
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    run("mkfs.erofs", &["--quiet", &path("base.erofs"), &path("image")]);
    let layer = fs::File::create(directory.join("rootfs.ext4")).unwrap();
    layer.set_len(1 << 30).unwrap();
    run(
        "mke2fs",
        &[
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=1",
            &path("rootfs.ext4"),
        ],
    );
}

fn with_busybox(image: &Path) {
    for name in ["bin", "etc", "data", "data/in"] {
        fs::create_dir(image.join(name)).unwrap();
    }
    fs::copy("/usr/bin/busybox", image.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "yes", "unshare", "mv", "touch", "uname", "md5sum", "mount", "ps", "id",
        "sleep", "wc", "seq", "ls",
    ] {
        std::os::unix::fs::symlink("busybox", image.join("bin").join(applet)).unwrap();
    }
    fs::write(image.join("etc/passwd"), "app:x:1000:1000::/home/app:/bin/sh\n").unwrap();
    std::os::unix::fs::symlink("/run/stub.conf", image.join("etc/resolv.conf")).unwrap();
}

/// Starts a machine. The link's socket listens before it does, so it can be dialled at once.
fn boot(directory: TempDir) -> Machine {
    let socket = UnixListener::bind(directory.path().join("link.sock")).unwrap();
    let bundle = bundle();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let append = format!(
        "console=ttyS0 reboot=t panic=-1 quiet loglevel=1 tsc_early_khz={} tsc=reliable \
         mitigations=off no_timer_check rcupdate.rcu_expedited=1",
        tsc_khz()
    );
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "microvm,acpi=on,rtc=on,pit=off,pic=off,x-option-roms=off"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,erms=off,fsrm=off"])
        .args(["-smp", "1", "-m", "128", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(bundle.join("kernel"))
        .arg("-initrd")
        .arg(bundle.join("initramfs"))
        .args(["-append", &append])
        .args(["-serial", &format!("file:{}", path("console.log"))])
        .args([
            "-drive",
            &format!("id=d0,file={},format=raw,if=none,readonly=on", path("base.erofs")),
        ])
        .args(["-device", "virtio-blk-device,drive=d0,serial=base"])
        .args([
            "-drive",
            &format!("id=d1,file={},format=raw,if=none,aio=threads", path("rootfs.ext4")),
        ])
        .args(["-device", "virtio-blk-device,drive=d1,serial=rootfs"])
        .args(["-device", "virtio-serial-device,max_ports=2"])
        .args(["-chardev", "socket,id=c0,fd=0,server=on,wait=off"])
        .args(["-device", "virtserialport,chardev=c0,nr=1,name=org.matchlock.link.0"])
        .stdin(Stdio::from(OwnedFd::from(socket)));
    Machine { qemu: qemu.spawn().unwrap(), directory }
}

impl Machine {
    async fn dial(&self, nonce: u8) -> (Host, usize) {
        let path = self.directory.path().join("link.sock");
        let line = in_time(UnixStream::connect(path)).await.unwrap();
        Host::dial(line, nonce).await
    }

    fn console(&self) -> String {
        fs::read_to_string(self.directory.path().join("console.log")).unwrap()
    }

    /// The power went off by order, and the guest had nothing to complain about.
    fn assert_quiet(&self) {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        assert!(matches!(lines[..], [only] if only.ends_with("reboot: Power down")), "{console}");
    }

    async fn wait(&mut self) {
        let qemu = &mut self.qemu;
        let ended = async {
            while qemu.try_wait().unwrap().is_none() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        in_time(ended).await;
    }
}

fn configure() -> Configure {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Configure {
        hostname: "box".into(),
        add_hosts: vec![("10.0.0.9".into(), "db".into())],
        dns_servers: vec!["1.1.1.1".into()],
        clock_unix_ns: u64::try_from(now.as_nanos()).unwrap(),
        cpu_millis: 900,
        network: None,
    }
}

async fn shell(host: &Host, job: u8, script: &str) -> (ExecOutput, String, String) {
    let mut job = host.exec(start(job, &["sh", "-c", script])).await;
    let end = job.finish().await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&job.stdout), text(&job.stderr));
    job.release().await;
    (end, stdout, stderr)
}

const OK: ExecOutput = ExecOutput::Exited(ExitStatus::Code(0));

#[test]
#[ignore = "boots QEMU; needs make guest"]
fn a_machine_boots_works_and_powers_off() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        disks(directory.path(), with_busybox);
        let begun = Instant::now();
        let mut machine = boot(directory);
        let (host, _) = machine.dial(1).await;
        let Reply::Hello(info) = host.ask(Request::Hello).await else {
            panic!("no hello");
        };
        println!("ready after {:?}: {info:?}", begun.elapsed());
        assert_eq!(host.ask(Request::Configure(configure())).await, Reply::Done);
        let begun = Instant::now();
        let (end, out, _) = shell(&host, 1, "uname -a").await;
        println!("first command took {:?}: {out}", begun.elapsed());
        assert_eq!(end, OK);
        assert!(out.starts_with("Linux box "), "{out}");
        let begun = Instant::now();
        let (end, ..) = shell(&host, 2, "exit 7").await;
        println!("second command took {:?}", begun.elapsed());
        assert_eq!(end, ExecOutput::Exited(ExitStatus::Code(7)));
        let (_, out, err) = shell(&host, 3, "mount; cat /etc/hosts /etc/resolv.conf; ls -l /etc /dev/fd/; id; ps; cat /sys/fs/cgroup/jobs/cpu.max /proc/self/cgroup /proc/self/oom_score_adj").await;
        println!("{out}{err}");
        assert!(out.contains("90000 100000\n0::/jobs\n0\n"), "{out}");
        assert!(out.contains("nameserver 1.1.1.1"), "{out}");

        // What other software needs to find: namespaces for users, a loopback device, limits.
        let script = "unshare -U id -u; cat /sys/class/net/lo/flags; ulimit -Sn; ulimit -Hn; \
                      mv /data/in /data/out; ls /data";
        let (_, out, err) = shell(&host, 8, script).await;
        assert_eq!(out, "65534\n0x9\n1024\n524288\nout\n", "{err}");
        let mut as_app = start(9, &["sh", "-c", "id -u; id -g; pwd; echo $HOME; touch /root/x"]);
        as_app.user = Some("app".into());
        as_app.cwd = Some("/made/for/it".into());
        let mut as_app = host.exec(as_app).await;
        assert_eq!(as_app.finish().await, ExecOutput::Exited(ExitStatus::Code(1)));
        assert_eq!(as_app.stdout, b"1000\n1000\n/made/for/it\n/home/app\n");
        as_app.release().await;

        let input: Vec<u8> = (0..4_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        let mut cat = start(4, &["cat"]);
        cat.stdin = true;
        let begun = Instant::now();
        let mut cat = host.exec(cat).await;
        assert_eq!(cat.feed(&input).await, OK);
        println!("4 MB through cat took {:?}", begun.elapsed());
        assert!(cat.stdout == input);
        cat.release().await;

        // The host dies and comes back while a command writes.
        let mut seq = host.exec(start(5, &["seq", "400000"])).await;
        while seq.stdout.len() < 50_000 {
            seq.next().await.unwrap();
        }
        let (mut out, offset) = (std::mem::take(&mut seq.stdout), seq.offset);
        drop(seq);
        host.vanish().await;
        let (host, stale) = machine.dial(2).await;
        println!("again, after {stale} stale bytes");
        let mut seq = host.attach(matchlock_wire::message::JobId([5; 16]), offset).await;
        assert_eq!(seq.finish().await, OK);
        out.extend(&seq.stdout);
        let expected: String = (1..=400_000).map(|n| format!("{n}\n")).collect();
        assert!(out == expected.as_bytes(), "not the same after attaching");
        seq.release().await;

        // A command that must be told to end, and one that leaves something behind.
        let (end, ..) = shell(&host, 6, "echo kept > /kept; sleep 1000 >/dev/null & exit 0").await;
        assert_eq!(end, OK);
        let script = "trap 'echo told; exit 3' TERM; echo up; while :; do sleep 1000 & wait; done";
        let mut waiting = host.exec(start(7, &["sh", "-c", script])).await;
        while waiting.stdout != b"up\n" {
            waiting.next().await.unwrap();
        }
        let begun = Instant::now();
        let order = Request::Shutdown(Shutdown { grace_ms: 10_000 });
        assert_eq!(host.ask(order).await, Reply::Done);
        assert_eq!(waiting.finish().await, ExecOutput::Exited(ExitStatus::Code(3)));
        assert_eq!(waiting.stdout, b"up\ntold\n");
        machine.wait().await;
        println!("powered off after {:?}", begun.elapsed());
        machine.assert_quiet();
        let layer = machine.directory.path().join("rootfs.ext4");
        let output = Command::new("e2fsck").args(["-f", "-n"]).arg(&layer).output().unwrap();
        println!("{}", String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success(), "{output:?}");
        let state = Command::new("dumpe2fs").arg("-h").arg(&layer).output().unwrap();
        let state = String::from_utf8(state.stdout).unwrap();
        let line = state.lines().find(|line| line.starts_with("Filesystem state:"));
        assert_eq!(line.map(str::trim_end), Some("Filesystem state:         clean"));
        let kept = Command::new("debugfs").args(["-R", "cat /upper/kept"]).arg(&layer).output();
        assert_eq!(kept.unwrap().stdout, b"kept\n");
    });
}

#[test]
#[ignore = "boots QEMU; needs make guest"]
fn every_byte_arrives_once_over_a_real_port() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        disks(directory.path(), with_busybox);
        let machine = boot(directory);
        let path = machine.directory.path().join("link.sock");
        for seed in 1..=4 {
            let begun = Instant::now();
            torn(seed, async || in_time(UnixStream::connect(&path)).await.unwrap()).await;
            println!("seed {seed} took {:?}", begun.elapsed());
        }
        assert_eq!(machine.console(), "");
    });
}

#[test]
#[ignore = "boots QEMU; needs make guest"]
fn an_empty_image_boots() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        disks(directory.path(), |_| {});
        let mut machine = boot(directory);
        let (host, _) = machine.dial(1).await;
        assert_eq!(host.ask(Request::Configure(configure())).await, Reply::Done);
        let mut job = host.exec(start(1, &["sh", "-c", "true"])).await;
        let ExecOutput::Failed(failure) = job.finish().await else {
            panic!("a shell from nowhere");
        };
        println!("{failure:?}");
        let order = Request::Shutdown(Shutdown { grace_ms: 1000 });
        assert_eq!(host.ask(order).await, Reply::Done);
        machine.wait().await;
        machine.assert_quiet();
    });
}

#[test]
#[ignore = "boots QEMU; needs make guest"]
fn a_command_that_will_not_end_does_not_keep_the_power_on() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        disks(directory.path(), with_busybox);
        let mut machine = boot(directory);
        let (host, _) = machine.dial(1).await;
        let script = "trap '' TERM; echo up; while :; do :; done";
        let mut stubborn = host.exec(start(1, &["sh", "-c", script])).await;
        while stubborn.stdout != b"up\n" {
            stubborn.next().await.unwrap();
        }
        stubborn.send(ExecInput::Ack { offset: 3 }).await;
        let order = Request::Shutdown(Shutdown { grace_ms: 300 });
        assert_eq!(host.ask(order).await, Reply::Done);
        machine.wait().await;
        machine.assert_quiet();
    });
}

#[test]
#[ignore = "boots QEMU; needs make guest"]
fn a_machine_without_its_disk_says_so_and_ends() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        disks(directory.path(), |_| {});
        // Not an EROFS any more.
        fs::write(directory.path().join("base.erofs"), vec![0; 1 << 20]).unwrap();
        let mut machine = boot(directory);
        machine.wait().await;
        let console = machine.console();
        assert!(console.contains("matchlock-guest: fatal: cannot mount erofs"), "{console}");
        assert!(console.contains("Kernel panic"), "{console}");
    });
}
