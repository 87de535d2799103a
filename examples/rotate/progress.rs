//! A line on stderr that says how far long work is.

use std::io::Write;
use std::time::{Duration, Instant};

/// Time from one drawing to the next.
const INTERVAL: Duration = Duration::from_millis(100);
/// Characters of the bar.
const BAR: usize = 24;

/// Draws nothing until the work has taken a while, and removes what it drew.
pub struct Progress<'a> {
    out: &'a mut dyn Write,
    /// When it begins to draw, after so much time; never, if `None`.
    after: Option<Duration>,
    started: Instant,
    drawn: Option<Instant>,
    what: &'static str,
    steps: usize,
    done: usize,
}

impl<'a> Progress<'a> {
    pub fn new(out: &'a mut dyn Write, after: Option<Duration>) -> Self {
        Self {
            out,
            after,
            started: Instant::now(),
            drawn: None,
            what: "",
            steps: 0,
            done: 0,
        }
    }

    /// Work of so many steps begins.
    pub fn begin(&mut self, what: &'static str, steps: usize) {
        (self.what, self.steps, self.done) = (what, steps, 0);
        self.draw();
    }

    /// One step more is done.
    pub fn step(&mut self) {
        self.done += 1;
        self.draw();
    }

    fn draw(&mut self) {
        let waits = self
            .after
            .is_none_or(|after| self.started.elapsed() < after);
        let is_recent = self.drawn.is_some_and(|drawn| drawn.elapsed() < INTERVAL);
        if waits || is_recent && self.done < self.steps {
            return;
        }
        self.drawn = Some(Instant::now());
        let part = |of: usize| self.done.min(self.steps) * of / self.steps.max(1);
        let bar = "#".repeat(part(BAR));
        let (what, percent) = (self.what, part(100));
        // Whoever does not see it misses nothing.
        let _ = write!(self.out, "\r{what:<24} [{bar:.<BAR$}] {percent:>3}%\x1b[K");
        let _ = self.out.flush();
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = write!(self.out, "\r\x1b[K");
            let _ = self.out.flush();
        }
    }
}
