//! Files that are read, written and listed, seen from the host.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use bytes::BytesMut;
use matchlock_wire::frame::Codec;
use matchlock_wire::message::{
    ExecFailureKind, ExecInput, ExecOutput, ExitStatus, FileEntry, FileOp, FileStart,
    JOB_WINDOW_BYTES, JobId,
};
use tokio_util::codec::Decoder as _;

use crate::support::{Guest, Host, Job, block_on, in_time};

fn start(id: u8, op: FileOp) -> FileStart {
    FileStart { job: JobId([id; 16]), op }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn read(id: u8, path: &Path, offset: u64, length: Option<u64>) -> FileStart {
    start(id, FileOp::Read { path: text(path), offset, length })
}

fn write(id: u8, path: &Path, offset: Option<u64>) -> FileStart {
    start(id, FileOp::Write { path: text(path), offset, mode: 0o7750 })
}

/// Opens a file that can be.
async fn open(host: &Host, start: FileStart) -> Job {
    let mut job = host.files(start).await;
    assert_eq!(job.next().await, Some(ExecOutput::Started));
    job
}

/// What is printed and how it ended.
async fn printed(host: &Host, start: FileStart) -> (Vec<u8>, Vec<u8>, ExecOutput) {
    let mut job = open(host, start).await;
    let last = job.finish().await;
    let printed = (job.stdout.clone(), job.stderr.clone(), last);
    job.release().await;
    printed
}

async fn written(host: &Host, start: FileStart, data: &[u8]) -> ExecOutput {
    let mut job = open(host, start).await;
    let last = job.feed(data).await;
    job.release().await;
    last
}

const OK: ExecOutput = ExecOutput::Exited(ExitStatus::Code(0));

async fn refusal(host: &Host, start: FileStart) -> (ExecFailureKind, String) {
    match host.files(start).await.next().await {
        Some(ExecOutput::Failed(failure)) => (failure.kind, failure.message),
        other => panic!("unexpected {other:?}"),
    }
}

#[test]
fn a_file_is_written_with_its_directories_and_read_again() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/file");
        let (_guest, host) = Guest::with_host().await;
        assert_eq!(written(&host, write(1, &path, None), b"hello there").await, OK);
        assert_eq!(std::fs::read(&path).unwrap(), b"hello there");
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o750, 0o755), "nine bits count");

        for (id, offset, length, expected) in
            [(2, 0, None, &b"hello there"[..]), (3, 6, Some(3), b"the"), (4, 100, None, b"")]
        {
            let read = printed(&host, read(id, &path, offset, length)).await;
            assert_eq!(read, (expected.to_vec(), vec![], OK));
        }

        // In its middle: the rest stays. Replaced: nothing stays but its mode.
        for (id, offset, expected) in
            [(5, Some(6), &b"hello XYere"[..]), (6, Some(11), b"hello XYereXY"), (7, None, b"XY")]
        {
            assert_eq!(written(&host, write(id, &path, offset), b"XY").await, OK);
            assert_eq!(std::fs::read(&path).unwrap(), expected);
        }
    });
}

#[test]
fn a_reader_that_acknowledges_nothing_gets_a_window_and_no_more() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let window = usize::try_from(JOB_WINDOW_BYTES).unwrap();
        let bytes: Vec<u8> = (0..3 * window + 7).map(|n| (n / 3).to_le_bytes()[0]).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (guest, host) = Guest::with_host().await;
        let mut job = open(&host, read(1, &path, 0, None)).await;
        while job.stdout.len() < window {
            job.next().await.unwrap();
        }
        assert_eq!(job.stdout.len(), window);
        // Another file goes on meanwhile.
        assert_eq!(printed(&host, read(2, &path, 0, Some(5))).await.0, bytes[..5]);
        job.send(ExecInput::Ack { offset: JOB_WINDOW_BYTES }).await;
        assert_eq!(job.finish().await, OK);
        assert!(job.stdout == bytes);
        job.release().await;
        // Released in its middle, it is forgotten.
        open(&host, read(3, &path, 0, None)).await.release().await;
        in_time(async {
            while guest.jobs.count() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    });
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("dir")).unwrap();
        std::fs::write(at("file"), "abc").unwrap();
        make_fifo(&at("fifo"));
        let (_guest, host) = Guest::with_host().await;
        let list = |id, path: &Path| start(id, FileOp::List { path: text(path) });
        for (start, kind, words) in [
            (read(1, &at("none"), 0, None), ExecFailureKind::NotFound, "No such file"),
            (read(2, &at("dir"), 0, None), ExecFailureKind::File, "it is a directory"),
            (read(3, &at("fifo"), 0, None), ExecFailureKind::File, "not a regular file"),
            (write(4, &at("fifo"), None), ExecFailureKind::File, "No such device"),
            (write(5, &at("dir"), None), ExecFailureKind::File, "directory"),
            (write(6, &at("file/x"), None), ExecFailureKind::File, "file/x"),
            (write(7, &at("file"), Some(4)), ExecFailureKind::File, "beyond its end at 3"),
            (list(8, &at("file")), ExecFailureKind::File, "Not a directory"),
            (list(9, &at("none")), ExecFailureKind::NotFound, "No such file"),
            (read(9, &at("file"), 0, None), ExecFailureKind::Request, "used before"),
        ] {
            let (got, said) = refusal(&host, start.clone()).await;
            assert!(got == kind && said.contains(words), "{start:?}: {got:?} {said}");
        }
        assert_eq!(std::fs::read(at("file")).unwrap(), b"abc");
    });
}

fn make_fifo(path: &Path) {
    let made = std::process::Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

#[test]
fn a_directory_is_listed_one_level_with_what_its_entries_are() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        std::fs::write(dir.path().join("dir/below"), "").unwrap();
        std::fs::write(dir.path().join("file"), "abc").unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        let (_guest, host) = Guest::with_host().await;
        let list = start(1, FileOp::List { path: text(dir.path()) });
        let (out, _, last) = printed(&host, list).await;
        assert_eq!(last, OK);
        let (mut bytes, mut entries) = (BytesMut::from(&out[..]), Vec::new());
        while let Some(entry) = Codec::<FileEntry, ()>::default().decode(&mut bytes).unwrap() {
            assert!(entry.modified_unix_s > 1_600_000_000);
            entries.push((entry.name.0, entry.mode & 0o170_000, entry.size));
        }
        entries.sort();
        assert_eq!((entries.len(), bytes.len()), (3, 0));
        assert_eq!(entries[0].1, 0o040_000);
        assert_eq!(entries[1], (b"file".to_vec(), 0o100_000, 3));
        assert_eq!(entries[2], (b"link".to_vec(), 0o120_000, 7));
    });
}

#[test]
fn a_write_that_fails_later_says_why() {
    block_on(async {
        let (_guest, host) = Guest::with_host().await;
        // A regular file that takes numbers only.
        let path = Path::new("/proc/self/oom_score_adj");
        let mut job = open(&host, write(1, path, Some(0))).await;
        let last = job.feed(b"nonsense").await;
        assert_eq!(last, ExecOutput::Exited(ExitStatus::Code(1)));
        let said = String::from_utf8_lossy(&job.stderr).into_owned();
        assert!(said.contains("Invalid argument"), "{said}");
        job.release().await;
    });
}
