//! Blobs on their way, whole and swept.

use super::*;

fn hex_of(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn dirs() -> (tempfile::TempDir, ImageDirs) {
    let cache = tempfile::tempdir().unwrap();
    let dirs = ImageDirs::new(cache.path());
    (cache, dirs)
}

fn ours(dirs: &ImageDirs, hex: &str, size: u64) -> Partial {
    match claim(dirs, hex, size).unwrap() {
        Claim::Ours(partial) => partial,
        other => panic!("{other:?}"),
    }
}

fn files(dirs: &ImageDirs) -> Vec<String> {
    let mut names = Vec::new();
    for dir in [dirs.content(), partial_dir(dirs)] {
        for entry in std::fs::read_dir(dir).into_iter().flatten() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                names.push(entry.file_name().into_string().unwrap());
            }
        }
    }
    names.sort();
    names
}

#[test]
fn a_blob_has_its_name_only_once_it_is_whole() {
    let (_cache, dirs) = dirs();
    let hex = hex_of(b"hello world");
    let mut partial = ours(&dirs, &hex, 11);
    assert!(matches!(claim(&dirs, &hex, 11).unwrap(), Claim::Busy), "one downloads it");
    partial.write(b"hello ").unwrap();
    assert!(!path_of(&dirs, &hex).try_exists().unwrap());
    // Its process ends here; the next goes on.
    drop(partial);
    let mut partial = ours(&dirs, &hex, 11);
    assert_eq!(partial.done(), 6);
    partial.write(b"world").unwrap();
    let Finished::Whole(lease) = partial.finish().unwrap() else { panic!("not whole") };
    assert_eq!(read(&lease, &hex).unwrap(), b"hello world");
    assert!(matches!(claim(&dirs, &hex, 11).unwrap(), Claim::There(_)), "leases are shared");
    assert_eq!(files(&dirs), [format!("sha256_{hex}")]);
}

#[test]
fn what_is_not_what_it_should_be_gets_no_name() {
    let (_cache, dirs) = dirs();
    let hex = hex_of(b"right");
    let mut partial = ours(&dirs, &hex, 5);
    partial.write(b"wrong").unwrap();
    let Finished::Wrong(partial, found) = partial.finish().unwrap() else { panic!("named") };
    assert_eq!((partial.done(), found), (0, hex_of(b"wrong")));
    partial.discard().unwrap();
    assert!(files(&dirs).is_empty());
    // What is longer than the blob is not its start.
    let mut partial = ours(&dirs, &hex, 5);
    partial.write(b"too long").unwrap();
    drop(partial);
    assert_eq!(ours(&dirs, &hex, 5).done(), 0);
    assert!(put(&dirs, &hex, b"wrong").is_err());
}

#[test]
fn a_sweep_leaves_what_is_held_or_wanted() {
    let (_cache, dirs) = dirs();
    let blob = |text: &str| {
        let hex = hex_of(text.as_bytes());
        (put(&dirs, &hex, text.as_bytes()).unwrap().unwrap(), hex)
    };
    let ((wanted, wanted_hex), (held, held_hex), (left, _)) = (blob("a"), blob("b"), blob("c"));
    drop((wanted, left));
    let downloading = ours(&dirs, &hex_of(b"d"), 1);
    drop(ours(&dirs, &hex_of(b"e"), 1));
    let building = lock_build(&dirs, &hex_of(b"f")).unwrap().unwrap();
    std::fs::write(dirs.content().join("notes"), "").unwrap();
    let mut is_wanted = |hex: &str| hex == wanted_hex;
    let before = files(&dirs);
    let planned = sweep(&dirs, Partials::Remove, true, &mut is_wanted);
    assert_eq!((planned.removed.len(), files(&dirs)), (2, before), "only looked at");
    let swept = |partials, is_wanted: &mut dyn FnMut(&str) -> bool| {
        let Garbages { removed, in_use, errors } = sweep(&dirs, partials, false, is_wanted);
        assert!(errors.is_empty(), "{errors:?}");
        (removed.len(), in_use.len())
    };
    assert_eq!(swept(Partials::Keep, &mut is_wanted), (1, 1));
    assert_eq!(swept(Partials::Remove, &mut is_wanted), (1, 3));
    assert!(lock_build(&dirs, &hex_of(b"f")).unwrap().is_none(), "one builds it");
    building.release().unwrap();
    drop((held, downloading));
    assert_eq!(swept(Partials::Remove, &mut is_wanted), (2, 0));
    assert!(!path_of(&dirs, &held_hex).try_exists().unwrap());
    assert_eq!(files(&dirs), ["notes".to_owned(), format!("sha256_{wanted_hex}")]);
}

#[test]
fn a_blob_that_is_wanted_by_the_time_it_is_locked_stays() {
    let (_cache, dirs) = dirs();
    let hex = hex_of(b"a");
    drop(put(&dirs, &hex, b"a").unwrap());
    let mut asked = 0;
    let mut later = |_: &str| {
        asked += 1;
        asked == 2
    };
    assert!(sweep(&dirs, Partials::Remove, false, &mut later).removed.is_empty());
    assert!(matches!(claim(&dirs, &hex, 1).unwrap(), Claim::There(_)));
}

#[test]
fn a_blob_is_doubted_and_only_a_damaged_one_goes() {
    let (_cache, dirs) = dirs();
    let hex = hex_of(b"whole");
    drop(put(&dirs, &hex, b"whole").unwrap());
    // Who says something else of its size is wrong.
    let said = claim(&dirs, &hex, 600).unwrap_err().to_string();
    assert!(said.contains("has 600 bytes, and that has 5"), "{said}");
    forget_damaged(&dirs, &hex).unwrap();
    assert!(matches!(claim(&dirs, &hex, 5).unwrap(), Claim::There(_)));
    // Cut off on this disk, or changed there.
    for damage in ["who", "wrong"] {
        std::fs::remove_file(path_of(&dirs, &hex)).unwrap();
        std::fs::write(path_of(&dirs, &hex), damage).unwrap();
        match claim(&dirs, &hex, 5).unwrap() {
            Claim::There(lease) => {
                forget_damaged(&dirs, &hex).unwrap();
                assert!(path_of(&dirs, &hex).try_exists().unwrap(), "somebody holds it");
                drop(lease);
                forget_damaged(&dirs, &hex).unwrap();
            }
            other => assert!(matches!(other, Claim::Busy), "{other:?}"),
        }
        assert!(!path_of(&dirs, &hex).try_exists().unwrap());
        drop(put(&dirs, &hex, b"whole").unwrap());
    }
    forget_damaged(&dirs, &hex_of(b"none")).unwrap();
}

#[test]
fn what_is_known_of_a_layer_goes_with_it() {
    let (_cache, dirs) = dirs();
    let hex = hex_of(b"layer");
    let id = format!("sha256:{}", hex_of(b"content"));
    assert_eq!(diff_id(&dirs, &hex, 5).unwrap(), None);
    note(&dirs, &hex, 5, &id).unwrap();
    note(&dirs, &hex, 5, &id).unwrap();
    assert_eq!(diff_id(&dirs, &hex, 5).unwrap(), Some(id.clone()));
    assert_eq!(diff_id(&dirs, &hex, 6).unwrap(), None, "of that size it is no such layer");
    let named = dirs.content().join(format!("diff_{hex}"));
    for strange in ["", "5", "5 sha256:12", "5 x", "50 ", &"5".repeat(4096)] {
        std::fs::write(&named, strange).unwrap();
        assert_eq!(diff_id(&dirs, &hex, 5).unwrap(), None, "{strange}");
    }
    note(&dirs, &hex, 5, &id).unwrap();
    assert!(sweep(&dirs, Partials::Remove, false, &mut |other| other == hex).removed.is_empty());
    assert_eq!(sweep(&dirs, Partials::Keep, false, &mut |_| false).removed.len(), 1);
    assert!(files(&dirs).is_empty());
}

#[test]
fn nobody_has_to_wait_for_a_slow_download() {
    let (_cache, dirs) = dirs();
    let hex = hex_of(b"layer");
    assert_eq!(begun(&dirs, &hex).unwrap(), None);
    let mut slow = ours(&dirs, &hex, 5);
    slow.write(b"l").unwrap();
    assert_eq!(begun(&dirs, &hex).unwrap(), Some(1));
    let mut gone = own(&dirs, &hex).unwrap().unwrap();
    gone.write(b"lay").unwrap();
    drop(gone);
    let (mut first, mut second) =
        (own(&dirs, &hex).unwrap().unwrap(), own(&dirs, &hex).unwrap().unwrap());
    first.write(b"layer").unwrap();
    second.write(b"layer").unwrap();
    let Finished::Whole(lease) = first.finish().unwrap() else { panic!("not whole") };
    assert!(matches!(second.finish().unwrap(), Finished::Again), "it is there");
    assert!(matches!(claim(&dirs, &hex, 5).unwrap(), Claim::There(_)));
    slow.write(b"ayer").unwrap();
    assert!(matches!(slow.finish().unwrap(), Finished::Again));
    drop(lease);
    assert_eq!(files(&dirs), [format!("sha256_{hex}")]);
    // What is wrong gets no name here either.
    let mut wrong = own(&dirs, &hex_of(b"right")).unwrap().unwrap();
    wrong.write(b"wrong").unwrap();
    let Finished::Wrong(wrong, _) = wrong.finish().unwrap() else { panic!("not wrong") };
    wrong.discard().unwrap();
    // Bytes that are here do not wait at all.
    let hex = hex_of(b"manifest");
    let _slow = ours(&dirs, &hex, 8);
    assert!(put(&dirs, &hex, b"manifest").unwrap().is_some());
}
