//! Reads machine code as nvdisasm prints it, and counts what a thread executes.

use std::collections::{BTreeMap, HashMap};

/// The machine code of one kernel as blocks of instructions and the branches between them.
pub struct Code {
    blocks: Vec<Block>,
}

struct Block {
    /// Opcodes with their modifiers.
    instructions: Vec<String>,
    next: Vec<usize>,
}

/// Instructions that a thread executes; see `docs/kernel-sass.md` for the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Of the function, without padding.
    pub all: usize,
    /// Before the loop over heads and after it.
    pub once: usize,
    /// In forming the angles.
    pub angles: usize,
    /// One round of the loop over heads, its angles formed.
    pub round: Way,
}

/// What is on a way through blocks. Ordered by bytes first: the longest way misses no access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    /// Bytes of q and k that it loads and stores.
    pub bytes: usize,
    pub instructions: usize,
    /// Loads and stores of q and k.
    pub accesses: usize,
}

impl Way {
    fn then(self, next: Way) -> Way {
        Way {
            bytes: self.bytes + next.bytes,
            instructions: self.instructions + next.instructions,
            accesses: self.accesses + next.accesses,
        }
    }
}

/// Bytes of a load or store of q and k. Angles and positions are loaded as constants.
fn data_access(opcode: &str) -> Option<usize> {
    let mut parts = opcode.split('.');
    if !matches!(parts.next(), Some("LDG" | "STG")) || is_constant_load(opcode) {
        return None;
    }
    let size = parts.find_map(|part| match part {
        "U8" | "S8" => Some(1),
        "U16" | "S16" => Some(2),
        "64" => Some(8),
        "128" => Some(16),
        "256" => Some(32),
        _ => None,
    });
    Some(size.unwrap_or(4))
}

fn is_constant_load(opcode: &str) -> bool {
    opcode.starts_with("LDG") && opcode.split('.').any(|part| part == "CONSTANT")
}

impl Block {
    fn any(&self, what: impl Fn(&str) -> bool) -> bool {
        self.instructions.iter().any(|opcode| what(opcode))
    }

    fn way(&self) -> Way {
        let accesses = self.instructions.iter().filter_map(|i| data_access(i));
        Way {
            bytes: accesses.clone().sum(),
            instructions: self.instructions.len(),
            accesses: accesses.count(),
        }
    }

    fn exits(&self) -> bool {
        self.instructions.last().is_some_and(|last| last == "EXIT")
    }
}

impl Code {
    /// From the part of a listing that belongs to one function.
    pub fn parse(listing: &str) -> Code {
        struct Open {
            instructions: Vec<String>,
            target: Option<String>,
            falls_through: bool,
        }
        let mut open: Vec<Open> = Vec::new();
        let mut labels = HashMap::new();
        let mut at_start = true;
        for line in listing.lines().map(str::trim) {
            if let Some(label) = line.strip_suffix(':')
                && label.starts_with(".L_")
            {
                let next = open.len();
                labels.insert(label.to_string(), next);
                at_start = true;
                continue;
            }
            let Some((address, text)) = line.split_once("*/") else {
                continue;
            };
            let Some((text, _)) = text.split_once(';') else {
                continue;
            };
            assert!(address.starts_with("/*"), "not understood: {line}");
            if at_start {
                open.push(Open {
                    instructions: Vec::new(),
                    target: None,
                    falls_through: true,
                });
            }
            let block = open.last_mut().expect("just opened");
            let text = text.trim();
            let guarded = text.starts_with('@');
            let mut words = text.split_whitespace().skip(usize::from(guarded));
            let opcode = words.next().expect("an opcode");
            let operands = words.next().unwrap_or_default();
            block.instructions.push(opcode.to_string());
            at_start = true;
            match opcode.split('.').next() {
                // On sm_80 ptxas leaves loops by a call that nothing returns from.
                Some("BRA" | "CALL") => {
                    let (_, target) = text.split_once("`(").expect("a branch to a label");
                    let (target, _) = target.split_once(')').expect("a branch to a label");
                    block.target = Some(target.to_string());
                    // A predicate may also be the first operand.
                    block.falls_through = guarded || !operands.starts_with("`(");
                }
                Some("EXIT") => block.falls_through = guarded,
                Some("BRX" | "JMP" | "JMX" | "RET") => panic!("not understood: {text}"),
                _ => at_start = false,
            }
        }
        let count = open.len();
        let blocks = open.into_iter().enumerate().map(|(n, block)| {
            let target = block.target.map(|target| labels[&target]);
            let following = (block.falls_through && n + 1 < count).then_some(n + 1);
            Block {
                instructions: block.instructions,
                next: target.into_iter().chain(following).collect(),
            }
        });
        Code {
            blocks: blocks.collect(),
        }
    }

    pub fn counts(&self) -> Counts {
        let reached = self.reached(None);
        let loops = self.loops(&reached);
        let order = self.forward_order(&reached, &loops);
        let (head, body) = self.loop_over_heads(&loops);
        let inside = |n: usize| body[n];
        let steady = |n: usize| body[n] && !self.blocks[n].any(is_constant_load);
        let round = |allowed: &dyn Fn(usize) -> bool| {
            let ways = self.ways(&order, &[head], allowed, Ord::max);
            let last = ways.iter().enumerate().filter_map(|(n, way)| {
                let returns = self.blocks[n].next.contains(&head);
                way.filter(|_| returns)
            });
            last.max().expect("a way round the loop over heads")
        };
        let steady_round = round(&steady);
        let first_round = round(&inside);

        let before = self.ways(&order, &[0], &|n| n != head && !body[n], Ord::max);
        let before = (0..self.blocks.len())
            .filter(|&n| self.blocks[n].next.contains(&head))
            .filter_map(|n| before[n].map(|way| way.instructions));
        let leaving = (0..self.blocks.len()).filter(|&n| body[n]);
        let leaving: Vec<usize> = leaving
            .flat_map(|n| self.blocks[n].next.iter().copied())
            .filter(|&n| !body[n])
            .collect();
        let after = self.ways(&order, &leaving, &|n| !body[n], Ord::min);
        let after = (0..self.blocks.len())
            .filter(|&n| self.blocks[n].exits())
            .filter_map(|n| after[n].map(|way| way.instructions));

        Counts {
            all: (0..self.blocks.len())
                .filter(|&n| reached[n])
                .map(|n| self.blocks[n].instructions.len())
                .sum(),
            once: before.max().expect("a way into the loop over heads")
                + after.min().expect("a way out of the kernel"),
            angles: first_round.instructions - steady_round.instructions,
            round: steady_round,
        }
    }

    /// Blocks reached from the start, without passing through one of them.
    fn reached(&self, without: Option<usize>) -> Vec<bool> {
        let mut reached = vec![false; self.blocks.len()];
        let mut todo = vec![0];
        while let Some(n) = todo.pop() {
            if Some(n) != without && !reached[n] {
                reached[n] = true;
                todo.extend(&self.blocks[n].next);
            }
        }
        reached
    }

    /// Loops by their first block: all blocks from which control returns to it.
    fn loops(&self, reached: &[bool]) -> BTreeMap<usize, Vec<bool>> {
        let mut loops = BTreeMap::new();
        for head in (0..self.blocks.len()).filter(|&n| reached[n]) {
            // Blocks that are reached only through the head.
            let around = self.reached(Some(head));
            let mut todo: Vec<usize> = (0..self.blocks.len())
                .filter(|&n| reached[n] && !around[n] && self.blocks[n].next.contains(&head))
                .collect();
            if todo.is_empty() {
                continue;
            }
            let mut body = vec![false; self.blocks.len()];
            body[head] = true;
            while let Some(n) = todo.pop() {
                if !body[n] {
                    body[n] = true;
                    let before = |&m: &usize| reached[m] && self.blocks[m].next.contains(&n);
                    todo.extend((0..self.blocks.len()).filter(before));
                }
            }
            loops.insert(head, body);
        }
        loops
    }

    /// The innermost loop that loads, multiplies and stores; of several the one that moves most.
    fn loop_over_heads<'a>(&self, loops: &'a BTreeMap<usize, Vec<bool>>) -> (usize, &'a Vec<bool>) {
        let has = |body: &[bool], what: &dyn Fn(&str) -> bool| {
            (0..self.blocks.len()).any(|n| body[n] && self.blocks[n].any(what))
        };
        let rotating: Vec<_> = loops
            .iter()
            .filter(|(_, body)| {
                has(body, &|o| o.starts_with("LDG") && data_access(o).is_some())
                    && has(body, &|o| o.starts_with("STG"))
                    && has(body, &|o| o.starts_with("FMUL") || o.starts_with("FFMA"))
            })
            .collect();
        let innermost = rotating.iter().filter(|(head, body)| {
            let inside = |(other, _): &(&usize, _)| other != head && body[**other];
            !rotating.iter().any(inside)
        });
        let bytes = |body: &[bool]| -> usize {
            let inside = (0..self.blocks.len()).filter(|&n| body[n]);
            inside.map(|n| self.blocks[n].way().bytes).sum()
        };
        let (head, body) = innermost
            .max_by_key(|(_, body)| bytes(body))
            .expect("a loop over heads");
        (**head, body)
    }

    /// The blocks so that every branch but those back to a loop's head goes to a later one.
    fn forward_order(&self, reached: &[bool], loops: &BTreeMap<usize, Vec<bool>>) -> Vec<usize> {
        let forward = |from: usize, to: usize| !loops.get(&to).is_some_and(|body| body[from]);
        let mut waits: Vec<usize> = vec![0; self.blocks.len()];
        let edges = |n: usize| {
            self.blocks[n]
                .next
                .iter()
                .filter(move |&&to| forward(n, to))
        };
        for n in (0..self.blocks.len()).filter(|&n| reached[n]) {
            edges(n).for_each(|&to| waits[to] += 1);
        }
        let mut order = vec![0];
        let mut done = 0;
        while done < order.len() {
            for &to in edges(order[done]) {
                waits[to] -= 1;
                if waits[to] == 0 {
                    order.push(to);
                }
            }
            done += 1;
        }
        let all = reached.iter().filter(|&&reached| reached).count();
        assert_eq!(order.len(), all, "loops that are not nested");
        order
    }

    /// For each block the best way that ends with it, over allowed blocks and forward branches.
    fn ways(
        &self,
        order: &[usize],
        starts: &[usize],
        allowed: &dyn Fn(usize) -> bool,
        best: fn(Way, Way) -> Way,
    ) -> Vec<Option<Way>> {
        let mut ways: Vec<Option<Way>> = vec![None; self.blocks.len()];
        let mut place = vec![0; self.blocks.len()];
        for (at, &n) in order.iter().enumerate() {
            place[n] = at;
        }
        for &start in starts {
            ways[start] = Some(self.blocks[start].way());
        }
        for &n in order.iter().filter(|&&n| allowed(n)) {
            let Some(way) = ways[n] else { continue };
            for &to in &self.blocks[n].next {
                if allowed(to) && place[to] > place[n] {
                    let way = way.then(self.blocks[to].way());
                    ways[to] = Some(ways[to].map_or(way, |known| best(known, way)));
                }
            }
        }
        ways
    }
}
