//! The layout of the report: labelled lines, headings, tables.

const WIDTH: usize = 84;
const LABEL: usize = 13;

#[derive(Default)]
pub struct Report(String);

impl Report {
    /// `label  text`, with the text wrapped beside the label.
    pub fn field(&mut self, label: &str, text: &str) {
        let mut label = label;
        for line in wrap(&printable(text), WIDTH - LABEL - 2) {
            self.line(&format!("  {label:<LABEL$}{line}"));
            label = "";
        }
    }

    pub fn heading(&mut self, text: &str) {
        if !self.0.is_empty() {
            self.0.push('\n');
        }
        for line in wrap(&printable(text), WIDTH) {
            self.line(&line);
        }
    }

    /// Rows under a heading; the first column is text, the others are figures.
    pub fn table<const N: usize>(&mut self, rows: &[[impl AsRef<str>; N]]) {
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].as_ref().chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: [usize; N] = std::array::from_fn(width);
        for row in rows {
            let mut line = format!("  {:<1$}", row[0].as_ref(), widths[0]);
            for (cell, width) in row.iter().zip(widths).skip(1) {
                line += &format!("   {:>width$}", cell.as_ref());
            }
            self.line(&line);
        }
    }

    /// A remark on the table above it.
    pub fn note(&mut self, text: &str) {
        for line in wrap(text, WIDTH - 2) {
            self.line(&format!("  {line}"));
        }
    }

    pub fn finish(self) -> String {
        self.0
    }

    fn line(&mut self, text: &str) {
        self.0.push_str(text.trim_end());
        self.0.push('\n');
    }
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is a first line");
        if line.is_empty() {
            *line += word;
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            *line += " ";
            *line += word;
        } else {
            lines.push(word.to_string());
        }
    }
    lines
}

/// Text from a file or the command line, unable to move the cursor or to start a new line.
pub fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            printable.extend(c.escape_default());
        } else {
            printable.push(c);
        }
    }
    printable
}

/// `1,000,000`.
pub fn thousands(n: impl Into<i128>) -> String {
    let n = n.into();
    let digits = n.unsigned_abs().to_string();
    let mut text = String::from(if n < 0 { "-" } else { "" });
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A difference, in two or three digits.
pub fn small(x: f64) -> String {
    if x == 0.0 {
        "0".to_string()
    } else if x < 0.01 {
        format!("{x:.1e}")
    } else {
        format!("{x:.3}")
    }
}
