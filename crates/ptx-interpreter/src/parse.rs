//! Module structure: directives, variables, kernels, statements. Instructions go on to `decode`.

use crate::decode::{Body, Operand, Statement};
use crate::inst::{Function, Param, Space, Ty, Variable};
use crate::lex::{Lexer, Token};
use std::collections::HashMap;
use std::fmt;

/// Why a text was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    /// PTX line, from 1.
    pub line: u32,
    /// The line itself.
    pub text: String,
    pub message: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PTX line {}: {}: `{}`",
            self.line, self.message, self.text
        )
    }
}

impl std::error::Error for Error {}

/// A parsed PTX text, ready to run.
#[derive(Debug)]
pub struct Module {
    lines: Vec<String>,
    pub(crate) functions: Vec<Function>,
    pub(crate) variables: Vec<Variable>,
}

impl Module {
    pub fn parse(text: &str) -> Result<Module, Error> {
        let mut parser = Parser {
            lexer: Lexer::new(text),
            functions: Vec::new(),
            variables: Vec::new(),
            by_name: HashMap::new(),
            target: 0,
        };
        if let Err(message) = parser.module() {
            let line = parser.lexer.line;
            let source = text.lines().nth(line as usize - 1).unwrap_or("").trim();
            return Err(Error {
                line,
                text: source.to_owned(),
                message,
            });
        }
        Ok(Module {
            lines: text.lines().map(str::to_owned).collect(),
            functions: parser.functions,
            variables: parser.variables,
        })
    }

    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.functions.iter().map(|f| f.name.as_str())
    }

    /// Bytes of the parameter block of a kernel.
    pub fn param_size(&self, entry: &str) -> Option<usize> {
        self.function(entry).map(|f| f.param_size)
    }

    /// Initial bytes of a `.global` or `.const` variable of the module.
    pub fn variable(&self, name: &str) -> Option<&[u8]> {
        self.variables
            .iter()
            .find(|v| v.name == name)
            .map(|v| v.bytes.as_slice())
    }

    /// The source text, line by line, to make mutants from.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// The PTX lines (from 1) that hold the instructions of a kernel.
    pub fn code_lines(&self, entry: &str) -> Vec<u32> {
        let mut lines: Vec<u32> = self
            .function(entry)
            .into_iter()
            .flat_map(|f| &f.code)
            .map(|i| i.line)
            .collect();
        lines.dedup();
        lines
    }

    pub(crate) fn function(&self, entry: &str) -> Option<&Function> {
        self.functions.iter().find(|f| f.name == entry)
    }
}

type Parsed<T> = Result<T, String>;

pub(crate) struct Parser<'a> {
    lexer: Lexer<'a>,
    functions: Vec<Function>,
    variables: Vec<Variable>,
    by_name: HashMap<String, usize>,
    /// The architecture, as `sm_XY`.
    target: u32,
}

impl<'a> Parser<'a> {
    fn module(&mut self) -> Parsed<()> {
        let mut linkage = None;
        loop {
            let word = match self.lexer.next()? {
                Token::End => return Ok(()),
                Token::Word(word) => word,
                other => return Err(format!("expected a directive, found {other:?}")),
            };
            match word {
                ".version" => {
                    let version = self.lexer.rest_of_line();
                    let known = version.split_once('.').is_some_and(|(major, minor)| {
                        matches!(major.parse(), Ok(6..=9u32)) && minor.parse::<u32>().is_ok()
                    });
                    if !known {
                        return Err(format!("PTX version {version} is not one this reads"));
                    }
                }
                ".target" => {
                    let target = self.lexer.rest_of_line();
                    let digits = target.strip_prefix("sm_").unwrap_or("");
                    let digits = digits.strip_suffix(['a', 'f']).unwrap_or(digits);
                    self.target = digits
                        .parse()
                        .map_err(|_| format!("target {target} is not one this reads"))?;
                }
                ".address_size" => {
                    if self.lexer.rest_of_line() != "64" {
                        return Err("only 64-bit addresses are implemented".into());
                    }
                }
                ".file" => {
                    self.lexer.rest_of_line();
                }
                ".section" => self.section()?,
                ".visible" | ".weak" | ".extern" => {
                    linkage = Some(word);
                    continue;
                }
                ".entry" if linkage != Some(".extern") => self.entry()?,
                ".global" | ".const" | ".shared" => {
                    let variable = variable(&mut self.lexer, word, linkage == Some(".extern"))?;
                    let index = self.variables.len();
                    if self.by_name.insert(variable.name.clone(), index).is_some() {
                        return Err(format!("{} is declared twice", variable.name));
                    }
                    self.variables.push(variable);
                }
                _ => return Err(format!("directive {word} is not implemented")),
            }
            linkage = None;
        }
    }

    /// Debug sections carry nothing that runs.
    fn section(&mut self) -> Parsed<()> {
        match self.lexer.next()? {
            Token::Word(name) if name.starts_with(".debug") => {}
            other => return Err(format!("section {other:?} is not implemented")),
        }
        punct(&mut self.lexer, b'{')?;
        loop {
            match self.lexer.next()? {
                Token::Punct(b'}') => return Ok(()),
                Token::End => return Err("a section without its end".into()),
                _ => {}
            }
        }
    }

    fn entry(&mut self) -> Parsed<()> {
        let name = name(&mut self.lexer)?;
        if self.functions.iter().any(|f| f.name == name) {
            return Err(format!("{name} is declared twice"));
        }
        let (params, param_size) = self.params()?;
        let mut body = Body::new(&self.variables, &self.by_name, &params, self.target);
        let mut max_threads = None;
        let mut required_block = None;
        loop {
            match self.lexer.next()? {
                Token::Punct(b'{') => break,
                Token::Word(".maxntid") => {
                    let block = dimensions(&mut self.lexer)?;
                    max_threads = Some(block.iter().map(|&n| u64::from(n)).product());
                }
                Token::Word(".reqntid") => required_block = Some(dimensions(&mut self.lexer)?),
                // Hints to the register allocator.
                Token::Word(".minnctapersm" | ".maxnreg") => {
                    integer(&mut self.lexer)?;
                }
                other => return Err(format!("{other:?} is not implemented on a kernel")),
            }
        }
        statements(&mut self.lexer, &mut body)?;
        let function = body.finish(name.to_owned()).map_err(|(line, message)| {
            self.lexer.line = line;
            message
        })?;
        self.functions.push(Function {
            param_size,
            max_threads,
            required_block,
            ..function
        });
        Ok(())
    }

    fn params(&mut self) -> Parsed<(Vec<Param>, usize)> {
        let mut params = Vec::new();
        let mut end = 0usize;
        if self.lexer.peek()? != Token::Punct(b'(') {
            return Ok((params, end));
        }
        punct(&mut self.lexer, b'(')?;
        while self.lexer.peek()? != Token::Punct(b')') {
            if !params.is_empty() {
                punct(&mut self.lexer, b',')?;
            }
            match self.lexer.next()? {
                Token::Word(".param") => {}
                other => return Err(format!("expected .param, found {other:?}")),
            }
            let (mut align, ty) = alignment_and_type(&mut self.lexer)?;
            if self.lexer.peek()? == Token::Word(".ptr") {
                // Describes what the pointer points to, not the parameter.
                self.lexer.next()?;
                if let Token::Word(".global" | ".const") = self.lexer.peek()? {
                    self.lexer.next()?;
                }
                if self.lexer.peek()? == Token::Word(".align") {
                    self.lexer.next()?;
                    integer(&mut self.lexer)?;
                }
            }
            let name = name(&mut self.lexer)?.to_owned();
            let count = array_length(&mut self.lexer)?
                .unwrap_or(Some(1))
                .ok_or("a parameter without a size")?;
            align = align.max(ty.bytes());
            let offset = end.next_multiple_of(align);
            end = offset + ty.bytes() * count;
            params.push(Param { name, offset });
        }
        punct(&mut self.lexer, b')')?;
        Ok((params, end))
    }
}

fn punct(lexer: &mut Lexer, wanted: u8) -> Parsed<()> {
    match lexer.next()? {
        Token::Punct(found) if found == wanted => Ok(()),
        other => Err(format!("expected {:?}, found {other:?}", wanted as char)),
    }
}

fn name<'a>(lexer: &mut Lexer<'a>) -> Parsed<&'a str> {
    match lexer.next()? {
        Token::Word(word) if !word.starts_with('.') => Ok(word),
        other => Err(format!("expected a name, found {other:?}")),
    }
}

fn integer(lexer: &mut Lexer) -> Parsed<u64> {
    match lexer.next()? {
        Token::Int(value) => Ok(value),
        other => Err(format!("expected an integer, found {other:?}")),
    }
}

fn dimensions(lexer: &mut Lexer) -> Parsed<[u32; 3]> {
    let mut sizes = [1; 3];
    for (i, size) in sizes.iter_mut().enumerate() {
        if i > 0 {
            if lexer.peek()? != Token::Punct(b',') {
                break;
            }
            lexer.next()?;
        }
        *size = u32::try_from(integer(lexer)?).map_err(|_| "a block size out of range")?;
    }
    Ok(sizes)
}

/// `[.align n] .type`; the alignment is at least the type's own.
fn alignment_and_type(lexer: &mut Lexer) -> Parsed<(usize, Ty)> {
    let mut align = 1;
    loop {
        match lexer.next()? {
            Token::Word(".align") => {
                align = integer(lexer)? as usize;
                if !align.is_power_of_two() || align > 128 {
                    return Err(format!("alignment {align} is not implemented"));
                }
            }
            Token::Word(word) => {
                let ty = word.strip_prefix('.').and_then(Ty::parse);
                let ty = ty.filter(|&ty| ty != Ty::Pred);
                let ty = ty.ok_or_else(|| format!("{word} is not implemented here"))?;
                return Ok((align.max(ty.bytes()), ty));
            }
            other => return Err(format!("expected a type, found {other:?}")),
        }
    }
}

/// `None` without brackets, `Some(None)` for empty ones.
fn array_length(lexer: &mut Lexer) -> Parsed<Option<Option<usize>>> {
    if lexer.peek()? != Token::Punct(b'[') {
        return Ok(None);
    }
    lexer.next()?;
    let length = match lexer.peek()? {
        Token::Punct(b']') => None,
        _ => Some(integer(lexer)? as usize),
    };
    punct(lexer, b']')?;
    if lexer.peek()? == Token::Punct(b'[') {
        return Err("arrays of arrays are not implemented".into());
    }
    Ok(Some(length))
}

fn variable(lexer: &mut Lexer, directive: &str, external: bool) -> Parsed<Variable> {
    let (align, ty) = alignment_and_type(lexer)?;
    let name = name(lexer)?.to_owned();
    let length = array_length(lexer)?;
    let space = match directive {
        ".global" => Space::Global,
        ".const" => Space::Const,
        ".shared" => Space::Shared,
        _ => Space::Local,
    };
    let dynamic = external && space == Space::Shared && length == Some(None);
    if external && !dynamic {
        return Err("variables of other modules are not implemented".into());
    }
    let count = match length {
        Some(None) if dynamic => 0,
        Some(None) => return Err("an array without a length".into()),
        Some(Some(count)) => count,
        None => 1,
    };
    let size = count * ty.bytes();
    let mut bytes = Vec::new();
    let initialised = lexer.peek()? == Token::Punct(b'=');
    if matches!(space, Space::Global | Space::Const) {
        bytes = vec![0; size];
        if initialised {
            lexer.next()?;
            initial_bytes(lexer, ty, length.is_some(), &mut bytes)?;
        }
    } else if initialised {
        return Err("this space takes no initial values".into());
    }
    punct(lexer, b';')?;
    Ok(Variable {
        name,
        space,
        align,
        size,
        bytes,
        dynamic,
    })
}

fn initial_bytes(lexer: &mut Lexer, ty: Ty, braces: bool, bytes: &mut [u8]) -> Parsed<()> {
    let width = ty.bytes();
    let mut at = 0;
    if braces {
        punct(lexer, b'{')?;
    }
    loop {
        let value = immediate(&operand(lexer)?, ty)?;
        let element = bytes
            .get_mut(at..at + width)
            .ok_or("more initial values than elements")?;
        element.copy_from_slice(&value.to_le_bytes()[..width]);
        at += width;
        if !braces {
            return Ok(());
        }
        match lexer.next()? {
            Token::Punct(b',') => {}
            Token::Punct(b'}') => return Ok(()),
            other => return Err(format!("expected ',' or '}}', found {other:?}")),
        }
    }
}

/// The bits of a literal as an operand of type `ty`.
pub(crate) fn immediate(operand: &Operand, ty: Ty) -> Parsed<u64> {
    match *operand {
        Operand::Int(value, negative) => {
            let bits = ty.bits();
            let value = if negative {
                -i128::from(value)
            } else {
                i128::from(value)
            };
            if !(-(1i128 << (bits - 1))..1i128 << bits).contains(&value) {
                return Err(format!("{value} does not fit {bits} bits"));
            }
            if matches!(ty, Ty::F32 | Ty::F64 | Ty::F16 | Ty::Bf16) {
                return Err("an integer where a floating-point literal belongs".into());
            }
            Ok(value as u64 & ty.mask())
        }
        Operand::F32(bits) if matches!(ty, Ty::F32 | Ty::B32) => Ok(u64::from(bits)),
        Operand::F64(bits) if matches!(ty, Ty::F64 | Ty::B64) => Ok(bits),
        _ => Err(format!("{operand:?} is not a literal of type {ty:?}")),
    }
}

/// The statements of a kernel, from behind its opening brace to its closing one.
fn statements<'a>(lexer: &mut Lexer<'a>, body: &mut Body<'a, '_>) -> Parsed<()> {
    let mut depth = 0;
    loop {
        match lexer.next()? {
            Token::Punct(b'{') => {
                depth += 1;
                body.open_scope();
            }
            Token::Punct(b'}') if depth == 0 => return Ok(()),
            Token::Punct(b'}') => {
                depth -= 1;
                body.close_scope();
            }
            Token::Punct(b'@') => {
                let line = lexer.line;
                let negated = lexer.peek()? == Token::Punct(b'!');
                if negated {
                    lexer.next()?;
                }
                let guard = Some((name(lexer)?, negated));
                let opcode = name(lexer)?;
                instruction(lexer, body, line, guard, opcode)?;
            }
            Token::Word(directive) if directive.starts_with('.') => {
                body_directive(lexer, body, directive)?
            }
            Token::Word(word) => {
                if lexer.peek()? == Token::Punct(b':') {
                    lexer.next()?;
                    body.label(word)?;
                } else {
                    instruction(lexer, body, lexer.line, None, word)?;
                }
            }
            other => return Err(format!("expected a statement, found {other:?}")),
        }
    }
}

fn body_directive<'a>(
    lexer: &mut Lexer<'a>,
    body: &mut Body<'a, '_>,
    directive: &str,
) -> Parsed<()> {
    match directive {
        // Source positions, for debuggers.
        ".loc" => {
            lexer.rest_of_line();
            Ok(())
        }
        ".pragma" => match lexer.next()? {
            Token::Str(text) if text == "nounroll" || text.starts_with("used_bytes_mask ") => {
                punct(lexer, b';')
            }
            other => Err(format!("pragma {other:?} is not implemented")),
        },
        ".reg" => {
            let ty = match lexer.next()? {
                Token::Word(word) => word.strip_prefix('.').and_then(Ty::parse),
                _ => None,
            };
            let ty = ty.ok_or("expected a register type")?;
            loop {
                let name = name(lexer)?;
                let mut count = None;
                if lexer.peek()? == Token::Punct(b'<') {
                    lexer.next()?;
                    count = Some(u32::try_from(integer(lexer)?).map_err(|_| "too many registers")?);
                    punct(lexer, b'>')?;
                }
                body.register(name, count, ty)?;
                match lexer.next()? {
                    Token::Punct(b',') => {}
                    Token::Punct(b';') => return Ok(()),
                    other => return Err(format!("expected ',' or ';', found {other:?}")),
                }
            }
        }
        ".shared" | ".local" => body.variable(variable(lexer, directive, false)?),
        _ => Err(format!(
            "directive {directive} is not implemented in a kernel"
        )),
    }
}

fn instruction<'a>(
    lexer: &mut Lexer<'a>,
    body: &mut Body<'a, '_>,
    line: u32,
    guard: Option<(&'a str, bool)>,
    opcode: &'a str,
) -> Parsed<()> {
    let mut operands = Vec::new();
    if lexer.peek()? == Token::Punct(b';') {
        lexer.next()?;
    } else {
        loop {
            operands.push(operand(lexer)?);
            match lexer.next()? {
                Token::Punct(b',') => {}
                Token::Punct(b';') => break,
                other => return Err(format!("expected ',' or ';', found {other:?}")),
            }
        }
    }
    body.instruction(&Statement {
        line,
        guard,
        opcode,
        operands,
    })
}

fn operand<'a>(lexer: &mut Lexer<'a>) -> Parsed<Operand<'a>> {
    Ok(match lexer.next()? {
        Token::Int(value) => Operand::Int(value, false),
        Token::F32(bits) => Operand::F32(bits),
        Token::F64(bits) => Operand::F64(bits),
        Token::Punct(b'-') => Operand::Int(integer(lexer)?, true),
        Token::Punct(b'!') => Operand::NotPred(name(lexer)?),
        Token::Punct(b'[') => {
            let base = match lexer.next()? {
                Token::Word(word) => Operand::Word(word),
                Token::Int(value) => Operand::Int(value, false),
                other => return Err(format!("expected an address, found {other:?}")),
            };
            let mut offset = 0i64;
            loop {
                match lexer.next()? {
                    Token::Punct(b']') => break,
                    Token::Punct(b'+') => {
                        let negative = lexer.peek()? == Token::Punct(b'-');
                        if negative {
                            lexer.next()?;
                        }
                        let value = integer(lexer)? as i64;
                        offset = offset.wrapping_add(if negative {
                            value.wrapping_neg()
                        } else {
                            value
                        });
                    }
                    Token::Punct(b'-') => offset = offset.wrapping_sub(integer(lexer)? as i64),
                    other => return Err(format!("{other:?} is not implemented in an address")),
                }
            }
            Operand::Address(Box::new(base), offset)
        }
        Token::Punct(b'{') => {
            let mut elements = vec![operand(lexer)?];
            loop {
                match lexer.next()? {
                    Token::Punct(b',') => elements.push(operand(lexer)?),
                    Token::Punct(b'}') => break,
                    other => return Err(format!("expected ',' or '}}', found {other:?}")),
                }
            }
            Operand::Vector(elements)
        }
        Token::Word(word) if !word.starts_with('.') => {
            if lexer.peek()? == Token::Punct(b'|') {
                lexer.next()?;
                Operand::Pair(word, name(lexer)?)
            } else {
                Operand::Word(word)
            }
        }
        other => return Err(format!("expected an operand, found {other:?}")),
    })
}
