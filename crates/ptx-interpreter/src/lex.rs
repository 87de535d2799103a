//! PTX tokens.

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Token<'a> {
    /// Identifiers, directives, opcodes with their modifiers, register names.
    Word(&'a str),
    Int(u64),
    F32(u32),
    F64(u64),
    Str(&'a str),
    Punct(u8),
    End,
}

pub struct Lexer<'a> {
    text: &'a str,
    at: usize,
    /// Line of the token last returned, from 1.
    pub line: u32,
    line_here: u32,
    peeked: Option<(Token<'a>, u32)>,
}

fn in_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$' | b'%' | b'.')
}

impl<'a> Lexer<'a> {
    pub fn new(text: &'a str) -> Self {
        Lexer {
            text,
            at: 0,
            line: 1,
            line_here: 1,
            peeked: None,
        }
    }

    pub fn next(&mut self) -> Result<Token<'a>, String> {
        if let Some((token, line)) = self.peeked.take() {
            self.line = line;
            return Ok(token);
        }
        self.scan()
    }

    pub fn peek(&mut self) -> Result<Token<'a>, String> {
        if self.peeked.is_none() {
            let line = self.line;
            let token = self.scan()?;
            self.peeked = Some((token, self.line));
            self.line = line;
        }
        Ok(self.peeked.map_or(Token::End, |(token, _)| token))
    }

    /// What is left of the current line; for directives that end with the line.
    pub fn rest_of_line(&mut self) -> &'a str {
        debug_assert!(self.peeked.is_none());
        let rest = &self.text[self.at..];
        let length = rest.find('\n').unwrap_or(rest.len());
        self.at += length;
        rest[..length].split("//").next().unwrap_or("").trim()
    }

    fn scan(&mut self) -> Result<Token<'a>, String> {
        self.skip_blank()?;
        self.line = self.line_here;
        let bytes = self.text.as_bytes();
        let start = self.at;
        let Some(&first) = bytes.get(start) else {
            return Ok(Token::End);
        };
        if first.is_ascii_digit() {
            return self.number();
        }
        if first == b'"' {
            let length = self.text[start + 1..]
                .find('"')
                .ok_or("a string without its end")?;
            self.at = start + length + 2;
            return Ok(Token::Str(&self.text[start + 1..start + 1 + length]));
        }
        if in_word(first) {
            let mut end = start;
            while end < bytes.len() {
                if in_word(bytes[end]) {
                    end += 1;
                } else if bytes[end..].starts_with(b"::") {
                    end += 2;
                } else {
                    break;
                }
            }
            self.at = end;
            return Ok(Token::Word(&self.text[start..end]));
        }
        if b"{}()[]<>,;:@!+-|=".contains(&first) {
            self.at += 1;
            return Ok(Token::Punct(first));
        }
        Err(format!(
            "unexpected character {:?}",
            self.text[start..].chars().next().unwrap_or(' ')
        ))
    }

    fn skip_blank(&mut self) -> Result<(), String> {
        let bytes = self.text.as_bytes();
        while let Some(&b) = bytes.get(self.at) {
            let rest = &bytes[self.at..];
            if b == b'\n' {
                self.line_here += 1;
                self.at += 1;
            } else if b.is_ascii_whitespace() {
                self.at += 1;
            } else if rest.starts_with(b"//") {
                self.at += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
            } else if rest.starts_with(b"/*") {
                let length = self.text[self.at..]
                    .find("*/")
                    .ok_or("a comment without its end")?
                    + 2;
                self.line_here += rest[..length].iter().filter(|&&b| b == b'\n').count() as u32;
                self.at += length;
            } else {
                break;
            }
        }
        Ok(())
    }

    fn number(&mut self) -> Result<Token<'a>, String> {
        let bytes = self.text.as_bytes();
        let start = self.at;
        let mut end = start;
        while end < bytes.len() && in_word(bytes[end]) {
            end += 1;
        }
        self.at = end;
        let text = &self.text[start..end];
        let bad = || format!("number {text} is not of a form this reads");
        let hex = |digits: &str, width: usize| {
            let whole = digits.len() == width && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if whole {
                u64::from_str_radix(digits, 16).ok()
            } else {
                None
            }
        };
        if let Some(digits) = text.strip_prefix("0f").or(text.strip_prefix("0F")) {
            return Ok(Token::F32(hex(digits, 8).ok_or_else(bad)? as u32));
        }
        if let Some(digits) = text.strip_prefix("0d").or(text.strip_prefix("0D")) {
            return Ok(Token::F64(hex(digits, 16).ok_or_else(bad)?));
        }
        let plain = text.strip_suffix('U').unwrap_or(text);
        let (digits, radix) = match plain.strip_prefix("0x").or(plain.strip_prefix("0X")) {
            Some(digits) => (digits, 16),
            None if plain.len() > 1 && plain.starts_with('0') => (&plain[1..], 8),
            None => (plain, 10),
        };
        // `from_str_radix` would take a sign.
        if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
            return Err(bad());
        }
        u64::from_str_radix(digits, radix)
            .map(Token::Int)
            .map_err(|_| bad())
    }
}
