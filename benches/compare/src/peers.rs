//! Libraries in Python: `peers.py` runs in a Python that has some of the packages, does what it is
//! told, and is stopped while it is not its turn.

use crate::cases::{Contender, Sampling, THETA, WARM_UP};
use crate::{Failure, Setting};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// A line of the script's output.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    /// Of its packages, when it has started.
    Versions(BTreeMap<String, String>),
    /// The library that it prepares next.
    Trying(String),
    Skipped(Skipped),
    /// The libraries that it has prepared.
    Ready(Vec<String>),
    Seconds(f64),
    /// Why a run came to nothing.
    Failed(String),
}

/// What is not measured, and why.
#[derive(Debug, Deserialize, PartialEq)]
pub struct Skipped {
    pub library: String,
    pub reason: String,
    /// Not for this setting only: the package does not do it.
    pub always: bool,
}

/// Why a process answers no more.
#[derive(Clone, Debug)]
struct Ended(String);

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Ended {}

/// A running script. Stopped, except between a command and its answer.
struct Process {
    child: Child,
    /// None when it has been waited for.
    pipes: Option<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Process {
    fn start(python: &str, script: &Path) -> Result<Self, Ended> {
        let mut command = Command::new(python);
        command
            .arg(script)
            // Pages as all others have them: of what is measured, ONNX Runtime works on numpy's.
            .env("NUMPY_MADVISE_HUGEPAGE", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // A group of its own can be stopped with the processes that packages start. And should this
        // process be killed, the system hangs up a stopped group that it leaves behind.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let cannot = |error| Ended(format!("cannot be started ({error})"));
        let mut child = command.spawn().map_err(cannot)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let pipes = pipes.map(|(input, output)| (input, BufReader::new(output)));
        Ok(Self { child, pipes })
    }

    fn tell(&mut self, command: &Value) -> Result<(), Ended> {
        self.resume();
        let line = format!("{command}\n");
        let input = self.pipes.as_mut().map(|(input, _)| input);
        match input.map(|input| input.write_all(line.as_bytes())) {
            Some(Ok(())) => Ok(()),
            // It reads no more, as it has ended.
            _ => Err(self.end()),
        }
    }

    /// Waits for a line.
    fn hear(&mut self) -> Result<Answer, Ended> {
        let mut line = String::new();
        let output = self.pipes.as_mut().map(|(_, output)| output);
        let Some(Ok(1..)) = output.map(|output| output.read_line(&mut line)) else {
            return Err(self.end());
        };
        serde_json::from_str(&line)
            .map_err(|error| Ended(format!("answered {:?} ({error})", line.trim_end())))
    }

    /// The answer to a command that has one.
    fn ask(&mut self, command: &Value) -> Result<Answer, Ended> {
        self.tell(command)?;
        let answer = self.hear()?;
        self.pause();
        Ok(answer)
    }

    /// Waits for it to end, which it does when it finds its input closed.
    fn end(&mut self) -> Ended {
        self.resume();
        // Its output as well: it may be writing.
        self.pipes = None;
        match self.child.wait() {
            Ok(status) => Ended(format!("ended ({status})")),
            Err(error) => Ended(format!("ended ({error})")),
        }
    }

    /// Threads of OpenMP and others spin for a while when their work is done.
    fn pause(&self) {
        #[cfg(unix)]
        self.signal(nix::sys::signal::SIGSTOP);
    }

    fn resume(&self) {
        #[cfg(unix)]
        self.signal(nix::sys::signal::SIGCONT);
    }

    #[cfg(unix)]
    fn signal(&self, signal: nix::sys::signal::Signal) {
        // Once it has been waited for, its number may be another's.
        if self.pipes.is_some() {
            let group = nix::unistd::Pid::from_raw(self.child.id() as i32);
            // Fails only if it has ended, which is noticed when it does not answer.
            let _ = nix::sys::signal::killpg(group, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// A Python for one number of threads: how many a library uses is settled when it is loaded.
pub struct Session {
    python: String,
    script: PathBuf,
    start: Value,
    process: Result<Process, Ended>,
    pub versions: BTreeMap<String, String>,
}

/// Contenders of one session share it.
pub type Shared = Arc<Mutex<Session>>;

impl Session {
    pub fn start(python: &str, threads: usize, sampling: &Sampling) -> Result<Self, Failure> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/peers.py");
        Self::of_script(python, script.into(), threads, sampling)
    }

    fn of_script(
        python: &str,
        script: PathBuf,
        threads: usize,
        sampling: &Sampling,
    ) -> Result<Self, Failure> {
        let mut session = Self {
            python: python.to_owned(),
            script,
            start: json!({
                "threads": threads,
                "cold_bytes": sampling.cold_bytes,
                "warm_up": WARM_UP.as_secs_f64(),
            }),
            process: Err(Ended("has not been started".to_owned())),
            versions: BTreeMap::new(),
        };
        match session.restart() {
            Ok(()) => Ok(session),
            Err(ended) => {
                let script = session.script.display();
                Err(format!("{python} cannot run {script}: it {ended}").into())
            }
        }
    }

    fn restart(&mut self) -> Result<(), Ended> {
        let mut process = Process::start(&self.python, &self.script)?;
        match process.ask(&self.start)? {
            Answer::Versions(versions) => self.versions = versions,
            _ => return Err(Ended("did not answer with its versions".to_owned())),
        }
        self.process = Ok(process);
        Ok(())
    }

    /// Has every package prepared for a setting, in place of what was prepared before. A library
    /// that takes the process down costs its own figure, not those of the others.
    fn prepare(&mut self, setting: &Setting, skipped: &mut Vec<Skipped>) -> Vec<String> {
        let mut avoid = Vec::new();
        loop {
            let mut trying = None;
            let ended = match self.try_to_prepare(setting, &avoid, &mut trying, skipped) {
                Ok(ready) => return ready,
                Err(ended) => ended,
            };
            self.process = Err(ended.clone());
            let reason = format!("the process {ended}");
            let always = false;
            match trying {
                Some(library) if !avoid.contains(&library) => {
                    avoid.push(library.clone());
                    skipped.push(Skipped {
                        library,
                        reason,
                        always,
                    });
                }
                // No library is to blame: with the next setting it may still go on.
                _ => {
                    let library = self.to_string();
                    skipped.push(Skipped {
                        library,
                        reason,
                        always,
                    });
                    return Vec::new();
                }
            }
        }
    }

    fn try_to_prepare(
        &mut self,
        setting: &Setting,
        avoid: &[String],
        trying: &mut Option<String>,
        skipped: &mut Vec<Skipped>,
    ) -> Result<Vec<String>, Ended> {
        if self.process.is_err() {
            self.restart()?;
        }
        let process = self.process.as_mut().map_err(|ended| ended.clone())?;
        process.tell(&json!({ "prepare": problem(setting), "avoid": avoid }))?;
        loop {
            match process.hear()? {
                Answer::Trying(library) => *trying = Some(library),
                // Said again when it is started again.
                Answer::Skipped(one) if skipped.contains(&one) => {}
                Answer::Skipped(one) => skipped.push(one),
                Answer::Ready(libraries) => {
                    process.pause();
                    return Ok(libraries);
                }
                _ => return Err(Ended("answered what it was not asked".to_owned())),
            }
        }
    }

    fn run(&mut self, library: &str, calls: usize) -> Result<Duration, Failure> {
        let process = self.process.as_mut().map_err(|ended| ended.clone())?;
        let ended = match process.ask(&json!({ "run": library, "calls": calls })) {
            Ok(Answer::Seconds(seconds)) => return Ok(Duration::try_from_secs_f64(seconds)?),
            Ok(Answer::Failed(reason)) => return Err(reason.into()),
            Ok(_) => Ended("answered what it was not asked".to_owned()),
            Err(ended) => ended,
        };
        let ended = Ended(format!("the process {ended} in a call of {library}"));
        self.process = Err(ended.clone());
        Err(ended.into())
    }
}

/// The packages, where none of them is to be named alone.
impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let packages: Vec<&str> = self.versions.keys().map(String::as_str).collect();
        f.write_str(&packages.join(", "))
    }
}

/// What the sessions can measure of a setting, and what not.
pub fn contenders(sessions: &[Shared], setting: &Setting) -> (Vec<Contender>, Vec<Skipped>) {
    let (mut contenders, mut skipped) = (Vec::new(), Vec::new());
    for session in sessions {
        for library in lock(session).prepare(setting, &mut skipped) {
            let (session, name) = (Arc::clone(session), library.clone());
            contenders.push(Contender {
                library,
                run: Box::new(move |calls| lock(&session).run(&name, calls)),
            });
        }
    }
    (contenders, skipped)
}

fn lock(session: &Shared) -> MutexGuard<'_, Session> {
    session.lock().expect("no session panics")
}

fn problem(setting: &Setting) -> Value {
    let case = &setting.case;
    json!({
        "sequences": case.sequences,
        "tokens": case.tokens,
        "q_heads": case.q_heads,
        "k_heads": case.k_heads,
        "head_dim": case.head_dim,
        "rotary_dim": case.rotary_dim,
        "in_place": case.in_place,
        "cold": case.cold,
        "dtype": setting.dtype.name(),
        "pairing": setting.pairing.name(),
        "positions": case.positions(),
        "theta": THETA,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::{Case, measure};
    use phasor::{Dtype, Pairing};
    use std::ops::Deref;

    const SAMPLING: Sampling = Sampling {
        samples: 3,
        budget: Duration::from_secs(1),
        sample: Duration::from_millis(5),
        cold_bytes: 1,
    };

    /// What `peers.py` says, for libraries that do nothing but what `prepare` and `run` hold.
    fn script(prepare: &str, run: &str) -> String {
        format!(
            r#"
import json, os, sys

def answer(**fields):
    print(json.dumps(fields), flush=True)

start = json.loads(sys.stdin.readline())
answer(versions={{"first": "1", "second": str(start["threads"])}})
for line in sys.stdin:
    command = json.loads(line)
    if "prepare" in command:
        tokens, ready = command["prepare"]["tokens"], []
        for library in ("first", "second"):
            if library in command["avoid"]:
                continue
            answer(trying=library)
            {prepare}
            ready.append(library)
        answer(ready=ready)
    else:
        library, calls = command["run"], command["calls"]
        {run}
        answer(seconds=calls * 1e-3)
"#
        )
    }

    /// A session whose script is removed with it.
    struct Scripted {
        sessions: [Shared; 1],
        path: PathBuf,
    }

    impl Scripted {
        fn new(name: &str, text: &str) -> Result<Self, Failure> {
            let file = format!("compare-peers-{name}-{}.py", std::process::id());
            let path = std::env::temp_dir().join(file);
            std::fs::write(&path, text)?;
            let session = Session::of_script("python3", path.clone(), 2, &SAMPLING)
                .inspect_err(|_| std::fs::remove_file(&path).expect("it was written"))?;
            let sessions = [Arc::new(Mutex::new(session))];
            Ok(Self { sessions, path })
        }

        fn prepare(&self, tokens: usize) -> (Vec<Contender>, Vec<Skipped>) {
            let setting = Setting {
                case: Case::llama("", tokens),
                dtype: Dtype::F32,
                pairing: Pairing::HalfSplit,
                threads: 2,
            };
            contenders(&self.sessions, &setting)
        }

        fn id(&self) -> u32 {
            let session = lock(&self.sessions[0]);
            session.process.as_ref().expect("it runs").child.id()
        }
    }

    impl Drop for Scripted {
        fn drop(&mut self) {
            std::fs::remove_file(&self.path).expect("it was written");
        }
    }

    fn names(contenders: &[Contender]) -> Vec<&str> {
        contenders.iter().map(|one| one.library.deref()).collect()
    }

    /// As in `/proc/ID/stat`, after the name in parentheses.
    #[cfg(target_os = "linux")]
    fn state(id: u32) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    #[test]
    fn libraries_are_sampled_and_stopped_in_between() {
        let peers = Scripted::new("well", &script("pass", "pass")).unwrap();
        assert_eq!(lock(&peers.sessions[0]).versions["second"], "2");
        let (mut contenders, skipped) = peers.prepare(1);
        assert_eq!(names(&contenders), ["first", "second"]);
        assert_eq!(skipped, []);
        for taken in measure(&mut contenders, &SAMPLING) {
            let seconds = taken.unwrap();
            assert!((seconds.median - 1e-3).abs() < 1e-9, "{seconds:?}");
            // The signal may take a moment.
            #[cfg(target_os = "linux")]
            assert!((0..1000).any(|_| {
                std::thread::sleep(Duration::from_millis(1));
                state(peers.id()) == Some('T')
            }));
        }
        let id = peers.id();
        drop(contenders);
        drop(peers);
        #[cfg(target_os = "linux")]
        assert_eq!(state(id), None, "{id} is waited for");
    }

    #[test]
    fn a_library_that_ends_the_process_while_it_is_prepared_costs_itself() {
        let fatal = r#"library == "first" and tokens == 1 and os.kill(os.getpid(), 9)"#;
        let peers = Scripted::new("prepare", &script(fatal, "pass")).unwrap();
        let before = peers.id();
        let (mut contenders, skipped) = peers.prepare(1);
        assert_eq!(names(&contenders), ["second"]);
        assert_eq!(skipped.len(), 1);
        assert_eq!(skipped[0].library, "first");
        assert!(skipped[0].reason.contains("signal: 9"), "{skipped:?}");
        assert!(measure(&mut contenders, &SAMPLING)[0].is_ok());
        assert_ne!(peers.id(), before);
        // For this setting only.
        assert_eq!(names(&peers.prepare(2).0), ["first", "second"]);
    }

    #[test]
    fn a_process_that_ends_in_a_run_costs_what_it_had() {
        let fatal = r#"library == "second" and tokens == 1 and calls > 1 and sys.exit(3)"#;
        let peers = Scripted::new("run", &script("pass", fatal)).unwrap();
        let (mut contenders, _) = peers.prepare(1);
        contenders.push(Contender {
            library: "of this process".to_owned(),
            run: Box::new(|calls| Ok(Duration::from_millis(calls as u64))),
        });
        let taken = measure(&mut contenders, &SAMPLING);
        for taken in &taken[..2] {
            let reason = taken.as_ref().unwrap_err().to_string();
            assert!(reason.contains("status: 3"), "{reason}");
            assert!(reason.contains("in a call of second"), "{reason}");
        }
        assert!(taken[2].is_ok());
        let (mut contenders, skipped) = peers.prepare(2);
        assert_eq!(skipped, []);
        let taken = measure(&mut contenders, &SAMPLING);
        assert!(taken.iter().all(Result::is_ok));
    }

    #[test]
    fn an_exception_in_a_run_costs_its_library() {
        let fail = r#"
        if library == "first":
            answer(failed="no memory")
            continue
"#;
        let peers = Scripted::new("exception", &script("pass", fail)).unwrap();
        let taken = measure(&mut peers.prepare(1).0, &SAMPLING);
        assert_eq!(taken[0].as_ref().unwrap_err().to_string(), "no memory");
        assert!(taken[1].is_ok());
    }

    #[test]
    fn a_process_that_no_library_ends_is_tried_again_with_the_next_setting() {
        let fatal = script("pass", "pass").replace(
            "        for library in",
            "        tokens == 1 and sys.exit(3)
        for library in",
        );
        let peers = Scripted::new("script", &fatal).unwrap();
        let (contenders, skipped) = peers.prepare(1);
        assert_eq!(names(&contenders), [""; 0]);
        assert_eq!(skipped.len(), 1);
        assert_eq!(skipped[0].library, "first, second");
        assert_eq!(names(&peers.prepare(2).0), ["first", "second"]);
    }

    #[test]
    fn what_cannot_run_the_script_is_named() {
        let message = |failure: Option<Failure>| failure.expect("it cannot").to_string();
        let text = message(Session::start("/no/python", 1, &SAMPLING).err());
        assert!(text.contains("/no/python cannot run"), "{text}");
        let text = message(Scripted::new("start", "import sys; sys.exit(3)").err());
        assert!(text.contains("status: 3"), "{text}");
    }
}
