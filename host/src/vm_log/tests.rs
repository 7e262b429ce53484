use std::fs;
use std::path::Path;

use matchlock_model::id::VmId;
use tempfile::TempDir;

use super::*;

fn vm() -> (TempDir, VmPaths) {
    let home = TempDir::new().unwrap();
    let paths = VmPaths::new(home.path(), VmId::new(1));
    fs::create_dir_all(paths.logs()).unwrap();
    (home, paths)
}

const SMALL: LogLimits = LogLimits { file_bytes: 10, files: 3 };

fn writer(paths: &VmPaths, limits: LogLimits) -> LogWriter {
    LogWriter::open(paths, limits).unwrap()
}

fn reader(paths: &VmPaths, tail: Tail) -> LogReader {
    LogReader::open(paths, LogKind::Output, tail).unwrap().unwrap()
}

/// Everything that there is for now.
fn drain(reader: &mut LogReader) -> String {
    let (mut all, mut buffer) = (Vec::new(), [0; 7]);
    loop {
        match reader.read(&mut buffer).unwrap() {
            0 => return String::from_utf8(all).unwrap(),
            read => all.extend_from_slice(&buffer[..read]),
        }
    }
}

fn listed(dir: &Path) -> Vec<(String, u64)> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(Result::unwrap)
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
        .collect();
    names.sort();
    names
}

#[test]
fn a_flood_never_holds_more_than_the_limits() {
    for (files, sizes) in [(1, vec![5]), (2, vec![5, 10]), (3, vec![5, 10, 10])] {
        let (_home, paths) = vm();
        let limits = LogLimits { file_bytes: 10, files };
        let mut log = writer(&paths, limits);
        // In pieces of every size, larger than a file too.
        let mut written = String::new();
        for size in [1, 2, 3, 9, 10, 11, 25, 39, 5] {
            let piece: String = ('a'..='z').cycle().skip(written.len()).take(size).collect();
            log.append(piece.as_bytes()).unwrap();
            written.push_str(&piece);
            let held: u64 = listed(&paths.logs()).iter().map(|(_, size)| size).sum();
            assert!(held <= limits.total(), "{held} bytes of {limits:?}");
        }
        let found: Vec<u64> = listed(&paths.logs()).iter().map(|(_, size)| *size).collect();
        assert_eq!(found, sizes, "{files}");
        let kept: u64 = sizes.iter().sum();
        let end = &written[written.len() - usize::try_from(kept).unwrap()..];
        assert_eq!(drain(&mut reader(&paths, Tail::All)), end);
    }
}

#[test]
fn no_files_keep_nothing_and_a_log_goes_on_at_its_end() {
    let (_home, paths) = vm();
    writer(&paths, LogLimits { file_bytes: 10, files: 0 }).append(b"lost").unwrap();
    assert_eq!(listed(&paths.logs()), []);
    assert_eq!(drain(&mut reader(&paths, Tail::All)), "");
    writer(&paths, SMALL).append(b"one ").unwrap();
    writer(&paths, SMALL).append(b"two three").unwrap();
    assert_eq!(listed(&paths.logs()), [("vm.log".into(), 3), ("vm.log.1".into(), 10)]);
    assert_eq!(drain(&mut reader(&paths, Tail::All)), "one two three");
}

#[test]
fn a_follower_misses_nothing_while_files_move_on() {
    let (_home, paths) = vm();
    let mut following = reader(&paths, Tail::All);
    assert_eq!(drain(&mut following), "", "there is no file yet");
    let mut log = writer(&paths, SMALL);
    let mut seen = String::new();
    let mut written = String::new();
    for round in 0..50 {
        // Up to two moves between two looks: three files hold that.
        let piece = format!("{round:0width$}\n", width = round % 19);
        log.append(piece.as_bytes()).unwrap();
        written.push_str(&piece);
        seen.push_str(&drain(&mut following));
        assert_eq!(seen, written);
    }
}

#[test]
fn a_follower_that_was_overtaken_goes_on_with_the_oldest_that_is_left() {
    let (_home, paths) = vm();
    let mut log = writer(&paths, SMALL);
    log.append(b"first").unwrap();
    let mut following = reader(&paths, Tail::All);
    assert_eq!(drain(&mut following), "first");
    log.append(&[b'x'; 40]).unwrap();
    log.append(b"last\n").unwrap();
    // Its own file is open still and read to its end; the next is the oldest that is there.
    assert_eq!(drain(&mut following), format!("{}last\n", "x".repeat(5 + 20 + 5)));
}

#[test]
fn a_follower_sees_that_a_file_was_emptied() {
    let (_home, paths) = vm();
    fs::write(paths.logs().join("vm.log"), "a long beginning").unwrap();
    let mut following = reader(&paths, Tail::All);
    assert_eq!(drain(&mut following), "a long beginning");
    fs::write(paths.logs().join("vm.log"), "anew").unwrap();
    assert_eq!(drain(&mut following), "anew");
}

#[test]
fn the_last_lines_are_found_across_files() {
    let (_home, paths) = vm();
    let mut log = writer(&paths, SMALL);
    let text = "one\ntwo\nthree\nfour\nfive\n";
    log.append(text.as_bytes()).unwrap();
    let cases = [
        (0, ""),
        (1, "five\n"),
        (2, "four\nfive\n"),
        (3, "three\nfour\nfive\n"),
        (5, text),
        (99, text),
    ];
    for (lines, wanted) in cases {
        let mut found = reader(&paths, Tail::Lines(lines));
        assert_eq!(drain(&mut found), wanted, "{lines}");
    }
    // A last line without an end is one.
    log.append(b"six").unwrap();
    assert_eq!(drain(&mut reader(&paths, Tail::Lines(1))), "six");
    assert_eq!(drain(&mut reader(&paths, Tail::Lines(2))), "five\nsix");
    // Followed from the end.
    let mut following = reader(&paths, Tail::Lines(0));
    assert_eq!(drain(&mut following), "");
    log.append(b"seven\n").unwrap();
    assert_eq!(drain(&mut following), "seven\n");
}

#[test]
fn many_lines_are_found_whatever_their_length() {
    let (_home, paths) = vm();
    let text: String =
        (0..40_000).map(|line| format!("{}{line}\n", "y".repeat(line % 9))).collect();
    let limits = LogLimits { file_bytes: 150_000, files: 9 };
    writer(&paths, limits).append(text.as_bytes()).unwrap();
    let whole = drain(&mut reader(&paths, Tail::All));
    assert!(text.ends_with(&whole) && whole.len() >= 150_000);
    for lines in [1, 7, 9_000, 30_000] {
        let starts: Vec<usize> = text.match_indices('\n').map(|(at, _)| at + 1).collect();
        let wanted = &text[starts[starts.len() - 1 - lines]..];
        let found = drain(&mut reader(&paths, Tail::Lines(lines as u64)));
        assert_eq!(found.len(), wanted.len(), "{lines}");
        assert_eq!(found, wanted, "{lines}");
    }
}

#[test]
fn a_gap_in_the_numbers_is_passed_over() {
    let (_home, paths) = vm();
    fs::write(paths.logs().join("vm.log.1"), "older\n").unwrap();
    assert_eq!(drain(&mut reader(&paths, Tail::All)), "older\n");
    fs::write(paths.logs().join("vm.log"), "newer\n").unwrap();
    fs::rename(paths.logs().join("vm.log.1"), paths.logs().join("vm.log.2")).unwrap();
    assert_eq!(drain(&mut reader(&paths, Tail::All)), "older\nnewer\n");
}

#[test]
fn nothing_is_made_where_the_directory_was_removed_and_no_link_is_followed() {
    let (home, paths) = vm();
    let mut log = writer(&paths, SMALL);
    fs::remove_dir_all(&paths.dir).unwrap();
    // The open file takes it; the next one cannot be made.
    assert!(log.append(b"more than a file holds").is_err());
    assert!(!paths.dir.try_exists().unwrap());
    assert!(LogReader::open(&paths, LogKind::Output, Tail::All).unwrap().is_none());
    assert!(LogWriter::open(&paths, SMALL).is_err());

    fs::create_dir_all(paths.logs()).unwrap();
    let elsewhere = home.path().join("elsewhere");
    fs::write(&elsewhere, "precious").unwrap();
    std::os::unix::fs::symlink(&elsewhere, paths.logs().join("vm.log")).unwrap();
    assert!(LogWriter::open(&paths, SMALL).is_err());
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "precious");
    let mut found = reader(&paths, Tail::All);
    assert!(found.read(&mut [0; 10]).is_err());
}

#[test]
fn what_cannot_be_written_is_told_and_the_log_goes_on_afterwards() {
    let (_home, paths) = vm();
    let mut log = writer(&paths, LogLimits { file_bytes: 10, files: 1 });
    log.append(b"0123456789").unwrap();
    // Something else lies in the place of the next file.
    let file = paths.logs().join("vm.log");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    for _ in 0..2 {
        assert!(log.append(b"lost").is_err());
    }
    fs::remove_dir(&file).unwrap();
    log.append(b"again").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "again");
}
