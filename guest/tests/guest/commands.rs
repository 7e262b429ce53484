//! What a command finds when it starts, and what becomes of one that does not.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use matchlock_wire::message::{
    Bytes, ExecFailureKind, ExecInput, ExecOutput, ExecStart, ExitStatus, JobId,
};

use nix::sys::resource::{Resource, getrlimit};

use super::support::{Guest, Host, block_on, start};

const OK: ExecOutput = ExecOutput::Exited(ExitStatus::Code(0));

async fn run(host: &Host, start: ExecStart) -> (ExecOutput, String, String) {
    let mut job = host.exec(start).await;
    let end = job.finish().await;
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let result = (end, text(&job.stdout), text(&job.stderr));
    if matches!(result.0, ExecOutput::Exited(_)) {
        job.release().await;
    }
    result
}

async fn shell(host: &Host, job: u8, script: &str) -> (ExecOutput, String, String) {
    run(host, start(job, &["sh", "-c", script])).await
}

async fn refused(host: &Host, start: ExecStart) -> (ExecFailureKind, String) {
    match run(host, start).await {
        (ExecOutput::Failed(failure), ..) => {
            assert!(!failure.message.contains('\n'), "{failure:?}");
            (failure.kind, failure.message)
        }
        other => panic!("it was not refused: {other:?}"),
    }
}

fn program(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_command_has_two_outputs_and_an_end() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let (end, out, err) = shell(&host, 1, "echo out; echo err >&2; exit 7").await;
        assert_eq!(end, ExecOutput::Exited(ExitStatus::Code(7)));
        assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
        for (job, signal) in [(2, 9), (3, 11), (4, 15)] {
            let (end, ..) = shell(&host, job, &format!("kill -{signal} $$")).await;
            assert_eq!(end, ExecOutput::Exited(ExitStatus::Signal(signal)));
        }
        let (end, ..) = shell(&host, 5, "exit 255").await;
        assert_eq!(end, ExecOutput::Exited(ExitStatus::Code(255)));
        assert_eq!(guest.jobs.count(), 0);
    });
}

#[test]
fn arguments_and_environment_arrive_as_bytes() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let mut start = start(1, &["sh", "-c", "printf '%s|%s|%s' \"$1\" \"$2\" \"$V\"", "sh"]);
        start.argv.push(Bytes(b"a b\n\xff".to_vec()));
        start.argv.push(Bytes(Vec::new()));
        start.env.push((Bytes::from("V"), Bytes::from("first")));
        start.env.push((Bytes::from("V"), Bytes(b"\xfe=".to_vec())));
        let mut job = host.exec(start).await;
        assert_eq!(job.finish().await, OK);
        assert_eq!(job.stdout, b"a b\n\xff||\xfe=");
        job.release().await;
    });
}

#[test]
fn a_command_starts_with_a_clean_process() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        // cat, not the shell, which may have handlers and descriptors of its own.
        let (end, status, _) = run(&host, start(1, &["cat", "/proc/self/status"])).await;
        assert_eq!(end, OK);
        for line in [
            "SigBlk:\t0000000000000000",
            "SigIgn:\t0000000000000000",
            "SigCgt:\t0000000000000000",
            "SigPnd:\t0000000000000000",
        ] {
            assert!(status.contains(line), "no {line} in {status}");
        }
        let (_, out, _) = run(&host, start(2, &["ls", "/proc/self/fd"])).await;
        assert_eq!(out, "0\n1\n2\n3\n", "3 is the directory that ls reads");
        let (_, out, _) = shell(
            &host,
            3,
            "echo $$; umask; ulimit -Sn; ulimit -Hn; pwd; cat /proc/self/oom_score_adj",
        )
        .await;
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let hard = hard.min(524_288);
        assert_eq!(out, format!("2\n0022\n1024\n{hard}\n/\n0\n"));
        let (_, out, _) = run(&host, start(4, &["cat"])).await;
        assert_eq!(out, "", "stdin is empty");
        let (_, out, _) = run(&host, start(5, &["sh", "-c", "hostname; env"])).await;
        let (name, variables) = out.split_once('\n').unwrap();
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let set: Vec<_> = variables.lines().filter(|line| !line.starts_with("PWD=")).collect();
        let hostname = format!("HOSTNAME={name}");
        for wanted in [path, &hostname, "HOME=/root", "USER=root"] {
            assert!(set.contains(&wanted), "{out}");
        }
        // Process 1 of the namespace and this shell: nobody else is to be seen.
        let (_, out, _) = shell(&host, 6, "cd /proc; set -- [0-9]*; echo $*").await;
        assert_eq!(out, "1 2\n");
    });
}

#[test]
fn a_command_runs_as_its_user_in_its_directory() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("made/on/demand");
        let mut as_user = start(1, &["sh", "-c", "pwd; id -u; id -g; id -G; echo $HOME $USER"]);
        as_user.user = Some("4242:4343".into());
        as_user.cwd = Some(deep.to_str().unwrap().into());
        let (end, out, err) = run(&host, as_user).await;
        assert_eq!(end, OK, "{err}");
        assert_eq!(out, format!("{}\n4242\n4343\n4343\n/\n", deep.display()));
        let mut nobody = start(2, &["sh", "-c", "id -un; id -gn; grep CapEff /proc/self/status"]);
        nobody.user = Some("nobody".into());
        let (end, out, err) = run(&host, nobody).await;
        assert_eq!(end, OK, "{err}");
        assert_eq!(out, "nobody\nnogroup\nCapEff:\t0000000000000000\n");
    });
}

#[test]
fn the_path_is_searched_like_everywhere() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for name in ["a", "b", "c", "a/tool"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        program(&root.join("b/tool"), "#!/bin/sh\necho b", 0o644);
        program(&root.join("c/tool"), "#!/bin/sh\necho c", 0o755);
        let with = |job: u8, path: &str, name: &str| {
            let mut start = start(job, &[name]);
            let path = path.replace('@', root.to_str().unwrap());
            start.env.push((Bytes::from("PATH"), Bytes(path.into_bytes())));
            start.cwd = Some(root.join("c").to_str().unwrap().into());
            start
        };
        let long = format!("/{}:@/none:@/a:@/b:@/c", "x".repeat(5000));
        let (_, out, _) = run(&host, with(1, &long, "tool")).await;
        assert_eq!(out, "c\n", "what cannot be executed is passed over");
        let (_, out, _) = run(&host, with(2, "@/none:", "tool")).await;
        assert_eq!(out, "c\n", "an empty entry is the working directory");
        let (_, out, _) = run(&host, with(3, "", "./tool")).await;
        assert_eq!(out, "c\n");
        let (kind, message) = refused(&host, with(4, "@/none:@/b", "tool")).await;
        assert_eq!(kind, ExecFailureKind::NotExecutable);
        assert_eq!(message, "exec: \"tool\": permission denied");
        let (kind, message) = refused(&host, with(5, "@/a", "tool")).await;
        assert_eq!(kind, ExecFailureKind::NotExecutable);
        assert_eq!(message, "exec: \"tool\": is a directory");
        let (kind, message) = refused(&host, with(6, "@/none:@/b/tool", "tool")).await;
        assert_eq!(kind, ExecFailureKind::NotFound);
        assert_eq!(message, "exec: \"tool\": executable file not found in $PATH");
        let (kind, message) = refused(&host, with(7, "@/c", "./none")).await;
        assert_eq!(kind, ExecFailureKind::NotFound);
        assert_eq!(message, "exec: \"./none\": no such file or directory");
    });
}

#[test]
fn what_cannot_be_executed_is_explained() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        program(Path::new(&path("script")), "#! /no/such/shell -e\n", 0o755);
        program(Path::new(&path("text")), "echo hello\n", 0o755);
        let mut elf = fs::read("/bin/true").unwrap();
        let loader = b"/lib64/ld-linux-x86-64.so.2\0";
        let at = elf.windows(loader.len()).position(|part| part == loader).unwrap();
        elf[at + 1..at + 4].copy_from_slice(b"not");
        fs::write(path("elf"), elf).unwrap();
        fs::set_permissions(path("elf"), fs::Permissions::from_mode(0o755)).unwrap();

        let (kind, message) = refused(&host, start(1, &[&path("script")])).await;
        assert_eq!(kind, ExecFailureKind::NotFound);
        let expected = "its interpreter \"/no/such/shell\" does not exist";
        assert!(message.ends_with(expected), "{message}");
        let (kind, message) = refused(&host, start(2, &[&path("elf")])).await;
        assert_eq!(kind, ExecFailureKind::NotFound);
        let expected = "its loader \"/not64/ld-linux-x86-64.so.2\" does not exist";
        assert!(message.ends_with(expected), "{message}");
        let (kind, message) = refused(&host, start(3, &[&path("text")])).await;
        assert_eq!(kind, ExecFailureKind::NotExecutable);
        assert!(message.ends_with("exec format error"), "{message}");
        let (kind, _) = refused(&host, start(4, &[&path("script/below")])).await;
        assert_eq!(kind, ExecFailureKind::NotFound);
        let (kind, message) = refused(&host, start(5, &["/tmp"])).await;
        assert_eq!(kind, ExecFailureKind::NotExecutable);
        assert_eq!(message, "exec: \"/tmp\": is a directory");

        // Too much for execve, but not for a frame.
        let mut large = start(6, &["true"]);
        large.argv.push(Bytes(vec![b'x'; 200_000]));
        let (kind, message) = refused(&host, large).await;
        assert_eq!(kind, ExecFailureKind::Request, "{message}");
        assert_eq!(guest.jobs.count(), 0);
    });
}

#[test]
fn wrong_requests_are_refused() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        let (kind, _) = refused(&host, start(1, &[])).await;
        assert_eq!(kind, ExecFailureKind::Request);
        let (kind, message) = refused(&host, start(1, &["true"])).await;
        assert_eq!(kind, ExecFailureKind::Request);
        assert!(message.contains("used"), "{message}");
        let (kind, _) = refused(&host, start(2, &["a\0b"])).await;
        assert_eq!(kind, ExecFailureKind::Request);
        let with_cwd = |job, cwd: &str| {
            let mut start = start(job, &["true"]);
            start.cwd = Some(cwd.into());
            start
        };
        for (job, cwd) in [(3, "/dev/null"), (4, "/dev/null/below"), (5, "/proc/nowhere")] {
            let (kind, message) = refused(&host, with_cwd(job, cwd)).await;
            assert_eq!(kind, ExecFailureKind::WorkingDirectory, "{cwd}");
            assert!(message.contains(cwd), "{message}");
        }
        for (job, user) in [(6, "no-such-user"), (7, "0:no-such-group"), (8, "")] {
            let mut start = start(job, &["true"]);
            start.user = Some(user.into());
            let (kind, _) = refused(&host, start).await;
            assert_eq!(kind, ExecFailureKind::User, "{user}");
        }
        // The answer may have been lost with the link, so it can be had again.
        for (job, expected) in [(6, ExecFailureKind::User), (99, ExecFailureKind::Request)] {
            let mut job = host.attach(JobId([job; 16]), 0).await;
            match job.finish().await {
                ExecOutput::Failed(failure) => assert_eq!(failure.kind, expected),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(guest.jobs.count(), 0);
    });
}

#[test]
fn no_more_than_the_limit_of_jobs_is_taken() {
    block_on(async {
        let (guest, host) = Guest::with_host().await;
        for job in 1..=64 {
            let mut job = host.exec(start(job, &["sleep", "1000"])).await;
            assert_eq!(job.next().await, Some(ExecOutput::Started));
        }
        let (kind, _) = refused(&host, start(65, &["true"])).await;
        assert_eq!(kind, ExecFailureKind::Unavailable);
        let mut one = host.attach(JobId([1; 16]), 0).await;
        one.send(ExecInput::Release).await;
        while one.next().await.is_some() {}
        let (end, ..) = run(&host, start(66, &["true"])).await;
        assert_eq!(end, OK);
        for job in 2..=64 {
            host.attach(JobId([job; 16]), 0).await.release().await;
        }
        assert_eq!(guest.jobs.count(), 0);
    });
}
