//! Long jobs: what signals leave behind, and `embed --resume`. Children are ended by signals at all times.
#![cfg(unix)]

mod cli_model;
mod cli_place;

use cli_place::{Place, Running, numbered, rows, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

const EMBED: [&str; 5] = ["embed", "-m", "model", "--backend", "cpu"];

fn start(place: &Place, args: &[&str]) -> Running {
    let mut command = place.command(args);
    Running(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

fn send(running: &Running, signal: Signal) {
    kill(Pid::from_raw(running.0.id().try_into().unwrap()), signal).unwrap();
}

/// Starts `embed` to a file from a stdin that does not end, and waits until rows are being written.
fn start_endless(place: &Place, output: &str) -> Running {
    let mut running = start(place, &[&EMBED[..], &["-o", output]].concat());
    let before = temporary(place).len();
    // More than a chunk, so that some rows are on their way.
    running.0.stdin.as_mut().unwrap().write_all("the cat\n".repeat(100).as_bytes()).unwrap();
    wait_until("a temporary file", || temporary(place).len() > before);
    running
}

fn temporary(place: &Place) -> Vec<String> {
    place.files().into_iter().filter(|name| name.starts_with(".trt-embed-")).collect()
}

#[test]
fn a_signal_leaves_no_file_and_is_told_by_the_status() {
    let place = Place::new();
    for (signal, status) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        for output in ["out.jsonl", "out.npy"] {
            let running = start_endless(&place, output);
            send(&running, signal);
            let (ended, said) = running.ends();
            assert_eq!(ended.code(), Some(status), "{said}");
            assert_eq!(said, format!("trt-embed: ended by {signal}; the unfinished output was removed\n"));
            assert_eq!(place.files(), [""; 0]);
        }
    }
    // What was there before stays.
    place.put("out.jsonl", "old");
    let running = start_endless(&place, "out.jsonl");
    send(&running, Signal::SIGTERM);
    assert_eq!(running.ends().0.code(), Some(143));
    assert_eq!(std::fs::read(place.path("out.jsonl")).unwrap(), b"old");
    assert_eq!(place.files(), ["out.jsonl"]);
}

#[test]
fn verbs_without_an_output_file_end_so_too() {
    let place = Place::new();
    let verbs: [&[&str]; 3] = [
        &["similarity", "-m", "model", "--backend", "cpu", "--query", "cat"],
        &["calibrate", "-m", "model", "--backend", "cpu", "-o", "calibration.json"],
        &EMBED,
    ];
    for verb in verbs {
        for (signal, status) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
            let running = start(&place, verb);
            // Once its signals are waited for, which it does first of all.
            wait_until("a thread for signals", || {
                let tasks = std::fs::read_dir(format!("/proc/{}/task", running.0.id())).unwrap();
                tasks
                    .flatten()
                    .any(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "signals"))
            });
            send(&running, signal);
            let (ended, said) = running.ends();
            assert_eq!(ended.code(), Some(status), "{said}");
            assert_eq!(said, format!("trt-embed: ended by {signal}\n"));
        }
    }
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn an_export_that_is_ended_at_any_time_leaves_whole_files_only() {
    let place = Place::new();
    let whole = |file: &str| std::fs::read(place.path("whole").join(file)).unwrap();
    let start_export = |folder: &str| start(&place, &["export", "-m", "model", "-o", folder]);
    let (ended, said) = start_export("whole").ends();
    assert!(ended.success(), "{said}");
    for delay in 0..12 {
        let running = start_export("out");
        std::thread::sleep(Duration::from_millis(4 * delay));
        send(&running, Signal::SIGINT);
        running.ends();
        for entry in std::fs::read_dir(place.path("out")).into_iter().flatten() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(std::fs::read(place.path("out").join(&name)).unwrap() == whole(&name), "{name} after {delay}");
        }
    }
}

#[test]
fn nohup_is_respected() {
    let place = Place::new();
    let mut command = std::process::Command::new("sh");
    command.current_dir(place.folder.path()).args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(env!("CARGO_BIN_EXE_trt-embed"));
    command.args(EMBED).args(["-o", "out.jsonl"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running(command.spawn().unwrap());
    running.0.stdin.as_mut().unwrap().write_all(b"the cat\n").unwrap();
    wait_until("a temporary file", || !temporary(&place).is_empty());
    send(&running, Signal::SIGHUP);
    std::thread::sleep(Duration::from_millis(100));
    drop(running.0.stdin.take());
    let (ended, said) = running.ends();
    assert!(ended.success(), "{said}");
    assert_eq!(rows(&std::fs::read_to_string(place.path("out.jsonl")).unwrap()).len(), 1);
}

#[test]
fn a_later_start_removes_what_a_killed_process_left_and_nothing_else() {
    let place = Place::new();
    let mut living = start_endless(&place, "living.jsonl");
    let of_the_living = temporary(&place);
    let killed = start_endless(&place, "killed.jsonl");
    send(&killed, Signal::SIGKILL);
    assert_eq!(killed.ends().0.signal(), Some(9));
    assert_eq!(temporary(&place).len(), 2, "SIGKILL leaves the file");
    place.embed(&["-o", "next.jsonl", "cat"]).ok();
    assert_eq!(temporary(&place), of_the_living);
    drop(living.0.stdin.take());
    let (ended, said) = living.ends();
    assert!(ended.success(), "{said}");
    assert_eq!(place.files(), ["living.jsonl", "next.jsonl"]);
    assert_eq!(rows(&std::fs::read_to_string(place.path("living.jsonl")).unwrap()).len(), 100);
}

/// A disk that takes no more, by a limit on the size of files.
#[test]
fn a_full_disk_leaves_nothing_or_what_can_be_gone_on_with() {
    let place = Place::new();
    place.put("lines.txt", "the cat\n".repeat(5000));
    let limited = |more: &[&str]| {
        let mut command = std::process::Command::new("sh");
        // 64 KiB: blocks have 512 bytes there, or 1024.
        command.current_dir(place.folder.path()).args(["-c", "ulimit -f 64; trap '' XFSZ; exec \"$0\" \"$@\""]);
        command.arg(env!("CARGO_BIN_EXE_trt-embed")).args(EMBED).args(["-i", "lines.txt", "-o", "out.npy"]).args(more);
        let out = command.output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(
            said.contains("cannot write") && said.contains("out.npy: File too large") && said.contains("ulimit -f"),
            "{said}"
        );
        said
    };
    limited(&[]);
    assert_eq!(place.files(), ["lines.txt"]);
    let said = limited(&["--resume"]);
    assert!(said.contains("lines are done, in out.npy.partial"), "{said}");
    let run = place.embed(&["-i", "lines.txt", "-o", "out.npy", "--resume"]);
    assert!(run.stderr.contains("going on behind line"), "{}", run.stderr);
    run.ok();
    place.embed(&["-i", "lines.txt", "-o", "whole.npy"]).ok();
    assert!(std::fs::read(place.path("out.npy")).unwrap() == std::fs::read(place.path("whole.npy")).unwrap());
    assert_eq!(place.files(), ["lines.txt", "out.npy", "whole.npy"]);
}

/// Lines of several lengths, some of them bad.
fn lines(count: usize) -> Vec<u8> {
    let mut lines = Vec::new();
    for i in 0..count {
        match i % 997 {
            500 => lines.extend(b"\xff\n"),
            _ => lines.extend(format!("{} {i}\n", ["the", "cat sat", "a red dog ran on the mat"][i % 3]).bytes()),
        }
    }
    lines
}

/// Some chunks of every size.
const LINES: usize = 16_000;

/// Kills a run with `--resume` at many times, lets it go on each time, and compares what comes out with a run that was left alone.
fn killed_again_and_again(name: &str, signal: Signal, seed: u64) {
    let place = Place::new();
    place.put("lines.txt", lines(LINES));
    let base = [&EMBED[..], &["-i", "lines.txt", "--on-error", "skip", "-o"]].concat();
    place.run(&[&base[..], &["whole"], &["--format", name]].concat()).ok();
    let args = [&base[..], &["out", "--format", name, "--resume"]].concat();
    let mut state = seed;
    let (mut gone_on, mut kills) = (0, 0);
    let ended = loop {
        let running = start(&place, &args);
        // Some at once, most while it works; in the end it is left alone.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        if kills < 6 {
            let working = state >> 62 > 0;
            if working {
                let before = std::fs::read(place.path("out.resume")).ok();
                let mut running = Some(());
                // Until another checkpoint was written, or it is over.
                wait_until("a checkpoint", || {
                    running = running.filter(|()| !place.path("out").exists());
                    running.is_none() || std::fs::read(place.path("out.resume")).ok() != before
                });
            }
            std::thread::sleep(Duration::from_millis(state >> 40 & 0x3f));
            send(&running, signal);
            kills += 1;
        }
        let (ended, said) = running.ends();
        gone_on += usize::from(said.contains("going on behind line"));
        if ended.success() {
            break said;
        }
        // One that came before the command waited for it ended it as any process: shells report the same status.
        let by_itself = ended.signal() == Some(signal as i32);
        assert!(by_itself || signal != Signal::SIGKILL && ended.code() == Some(128 + signal as i32), "{ended}: {said}");
    };
    assert!(gone_on > 0, "no run went on: {ended}");
    assert!(ended.contains("16 of 16000 lines were skipped; see "), "{ended}");
    assert_eq!(place.files(), ["lines.txt", "out", "out.errors.jsonl", "whole", "whole.errors.jsonl"]);
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert!(read("out") == read("whole"), "another output after {gone_on} resumed runs");
    assert!(read("out.errors.jsonl") == read("whole.errors.jsonl"));
}

#[test]
fn killed_runs_go_on_to_the_same_bytes_in_jsonl() {
    killed_again_and_again("jsonl", Signal::SIGKILL, 1);
}

#[test]
fn killed_runs_go_on_to_the_same_bytes_in_npy() {
    killed_again_and_again("npy", Signal::SIGKILL, 2);
}

#[test]
fn interrupted_runs_go_on_to_the_same_bytes() {
    killed_again_and_again("npy", Signal::SIGTERM, 3);
}

/// Leaves a run with `--resume` that was interrupted after some lines of `lines.txt`.
fn interrupted(place: &Place, more: &[&str]) {
    let running = start(place, &[&EMBED[..], &["-i", "lines.txt", "-o", "out.jsonl", "--resume"], more].concat());
    wait_until("a checkpoint", || place.path("out.jsonl.resume").exists());
    // Another one: what is said on a signal is true of the first then.
    let first = std::fs::read(place.path("out.jsonl.resume")).unwrap();
    wait_until("the next checkpoint", || std::fs::read(place.path("out.jsonl.resume")).unwrap() != first);
    send(&running, Signal::SIGINT);
    let (ended, said) = running.ends();
    assert_eq!(ended.code(), Some(130), "{said}");
    assert!(said.contains("lines are done, in out.jsonl.partial: the same command goes on"), "{said}");
    assert_eq!(place.files(), ["lines.txt", "out.jsonl.partial", "out.jsonl.resume"]);
}

#[test]
fn another_model_setting_or_input_is_an_error_that_names_it() {
    let place = Place::new();
    let good: Vec<u8> = (0..20_000).flat_map(|i| format!("the cat {i}\n").into_bytes()).collect();
    place.put("lines.txt", &good);
    interrupted(&place, &[]);
    let kept = |name: &str| std::fs::read(place.path(name)).unwrap();
    let before = (kept("out.jsonl.partial"), kept("out.jsonl.resume"));
    let resume = |more: &[&str]| place.embed(&[&["-i", "lines.txt", "-o", "out.jsonl", "--resume"], more].concat());
    resume(&["--dim", "4"]).fails(&["out.jsonl.resume", "--dim: 8 then, 4 now", "begin anew"]);
    resume(&["--prompt", "query"]).fails(&["--prompt: \"\" then, \"query: \" now"]);
    resume(&["--normalize", "off", "--pooling", "cls"])
        .fails(&["--normalize: on then, off now", "--pooling: mean then, cls now"]);
    resume(&["--max-tokens", "9"]).fails(&["--max-tokens: 24 then, 9 now"]);
    resume(&["--batch-size", "3"]).fails(&["--batch-size: 64 then, 3 now"]);
    resume(&["-f", "npy"]).fails(&["--format: jsonl then, npy now"]);
    resume(&["--hidden-states"]).fails(&["--hidden-states: off then, on now"]);
    resume(&["--input-format", "jsonl"]).fails(&["--input-format: lines then, jsonl now"]);
    // Another model: one file of it has changed.
    let pooling = place.path("model/1_Pooling/config.json");
    let config = std::fs::read(&pooling).unwrap();
    std::fs::write(&pooling, [&config[..], b" "].concat()).unwrap();
    resume(&[]).fails(&["model files: ", " then, "]);
    std::fs::write(&pooling, config).unwrap();
    // Another input: a letter of the first line, or less of it.
    let mut other = good.clone();
    other[0] = b'T';
    place.put("lines.txt", &other);
    resume(&[]).fails(&["lines.txt is not what the interrupted run read", "lines (", "have changed", "--resume"]);
    place.put("lines.txt", &good[..10]);
    resume(&[]).fails(&["lines.txt is not what the interrupted run read", "it has 10 bytes"]);
    place.put("lines.txt", &good);
    assert!((kept("out.jsonl.partial"), kept("out.jsonl.resume")) == before, "refusals changed something");
    // Lines that were added since are part of the input.
    place.put("lines.txt", [&good[..], b"one more\n"].concat());
    resume(&[]).ok();
    let got = rows(&std::fs::read_to_string(place.path("out.jsonl")).unwrap());
    assert_eq!(got.len(), 20_001);
    place.embed(&["-i", "lines.txt", "-o", "whole.jsonl"]).ok();
    assert!(kept("out.jsonl") == kept("whole.jsonl"));
}

#[test]
fn a_bad_line_can_be_mended_or_skipped_later() {
    for skip in [false, true] {
        let place = Place::new();
        let good = "the cat\n".repeat(5000);
        let mut bytes = good.clone().into_bytes();
        bytes.extend(b"\xff\n");
        bytes.extend(good.bytes());
        place.put("lines.txt", &bytes);
        let args = ["-i", "lines.txt", "-o", "out.jsonl", "--resume"];
        place.embed(&args).fails(&["line 5001 is not UTF-8", "lines are done, in out.jsonl.partial"]);
        assert_eq!(place.files(), ["lines.txt", "out.jsonl.partial", "out.jsonl.resume"]);
        let mut more = Vec::new();
        if skip {
            more.extend(["--on-error", "skip"]);
        } else {
            bytes[good.len()] = b'x';
            place.put("lines.txt", &bytes);
        }
        let run = place.embed(&[&args[..], &more].concat());
        assert!(run.stderr.contains("going on behind line"), "{}", run.stderr);
        run.ok();
        place.embed(&[&["-i", "lines.txt", "-o", "whole.jsonl"], &more[..]].concat()).ok();
        let read = |name: &str| std::fs::read_to_string(place.path(name)).unwrap();
        assert!(read("out.jsonl") == read("whole.jsonl"));
        assert_eq!(numbered(&read("out.jsonl")).len(), if skip { 10_000 } else { 10_001 });
    }
}

#[test]
fn skipped_lines_are_not_forgotten_by_a_run_that_would_fail_on_them() {
    let place = Place::new();
    let mut bytes = b"\xff\n".to_vec();
    bytes.extend("the cat\n".repeat(20_000).bytes());
    place.put("lines.txt", &bytes);
    let args = ["-i", "lines.txt", "-o", "out.jsonl", "--resume"];
    let running = start(&place, &[&EMBED[..], &args, &["--on-error", "skip"]].concat());
    wait_until("a checkpoint", || place.path("out.jsonl.resume").exists());
    send(&running, Signal::SIGKILL);
    running.ends();
    place.embed(&args).fails(&["has skipped 1 lines into out.jsonl.errors.jsonl", "would fail on them", "--on-error skip"]);
    let other = [&args[..], &["--on-error", "skip", "--errors", "e.jsonl"]].concat();
    place.embed(&other).fails(&["into out.jsonl.errors.jsonl, this one writes to e.jsonl"]);
    place.embed(&[&args[..], &["--on-error", "skip"]].concat()).ok();
    assert_eq!(place.files(), ["lines.txt", "out.jsonl", "out.jsonl.errors.jsonl"]);
}

#[test]
fn a_job_of_another_process_is_left_alone() {
    let place = Place::new();
    place.put("lines.txt", "the cat sat on the mat\n".repeat(20_000));
    let args = ["-i", "lines.txt", "-o", "out.npy", "--resume"];
    let running = start(&place, &[&EMBED[..], &args].concat());
    wait_until("the partial file", || place.path("out.npy.partial").exists());
    place.embed(&args).fails(&["out.npy", "another process is writing it"]);
    let (ended, said) = running.ends();
    assert!(ended.success(), "{said}");
    assert_eq!(place.files(), ["lines.txt", "out.npy"]);
}

#[test]
fn what_cannot_be_gone_on_with() {
    let place = Place::new();
    place.put("lines.txt", "the cat\n");
    place.embed_with(&["-o", "out.npy", "--resume"], b"cat\n").ends(2, &["--resume", "-i FILE"]);
    place.embed(&["-o", "out.npy", "--resume", "cat"]).ends(2, &["--resume", "-i FILE"]);
    place.embed(&["-i", "/dev/null", "-o", "out.npy", "--resume"]).ends(2, &["--resume", "-i FILE"]);
    place.embed(&["-i", "lines.txt", "--resume"]).ends(2, &["--resume", "-o FILE"]);
    place.embed(&["-i", "lines.txt", "-o", "/dev/null", "--resume"]).ends(2, &["--resume", "-o FILE"]);
    assert_eq!(place.files(), ["lines.txt"]);
    // A run without trouble leaves its output alone, and so does one that fails at its first line.
    place.embed(&["-i", "lines.txt", "-o", "out.npy", "--resume"]).ok();
    assert_eq!(place.files(), ["lines.txt", "out.npy"]);
    place.put("bad.txt", b"\xff\n");
    place.embed(&["-i", "bad.txt", "-o", "bad.npy", "--resume"]).fails(&["line 1"]);
    assert_eq!(place.files(), ["bad.txt", "lines.txt", "out.npy"]);
}

#[test]
fn damaged_sidecars_are_refused_and_lost_rows_are_noticed() {
    let place = Place::new();
    place.put("lines.txt", "the cat\n".repeat(20_000));
    interrupted(&place, &[]);
    let args = ["-i", "lines.txt", "-o", "out.jsonl", "--resume"];
    let sidecar = std::fs::read_to_string(place.path("out.jsonl.resume")).unwrap();
    for (wrong, part) in [
        ("", "not what --resume writes"),
        ("{}", "not what --resume writes"),
        ("{\"format\":7}", "its format is 7"),
        ("{\"format\":1}", "not what --resume writes"),
        (&sidecar.replace("\"rows\"", "\"row\""), "unknown field"),
    ] {
        place.put("out.jsonl.resume", wrong);
        place.embed(&args).fails(&["out.jsonl.resume", part, "remove it to begin anew"]);
    }
    place.put("out.jsonl.resume", &sidecar);
    // Rows that the sidecar promises are gone: some, or all.
    let partial = place.path("out.jsonl.partial");
    std::fs::File::options().write(true).open(&partial).unwrap().set_len(10).unwrap();
    place.embed(&args).fails(&["out.jsonl.partial has 10 bytes", "remove out.jsonl.resume to begin anew"]);
    std::fs::remove_file(&partial).unwrap();
    let run = place.embed(&args);
    assert!(run.stderr.contains("beginning anew: out.jsonl.partial is gone"), "{}", run.stderr);
    run.ok();
    assert_eq!(rows(&std::fs::read_to_string(place.path("out.jsonl")).unwrap()).len(), 20_000);
    assert_eq!(place.files(), ["lines.txt", "out.jsonl"]);
}

#[test]
fn a_run_without_resume_says_what_it_leaves_alone() {
    let place = Place::new();
    place.put("lines.txt", "the cat\n".repeat(20_000));
    interrupted(&place, &[]);
    let run = place.embed(&["-o", "out.jsonl", "cat"]);
    assert!(run.stderr.contains("out.jsonl.resume is of an interrupted run, which --resume goes on with"), "{}", run.stderr);
    run.ok();
    assert_eq!(place.files(), ["lines.txt", "out.jsonl", "out.jsonl.partial", "out.jsonl.resume"]);
}
