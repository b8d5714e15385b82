//! The known word that somebody may have meant.

/// The known word that is nearest to this one. None if none is near enough to be meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distances = known.into_iter().map(|it| (distance(word, it), it));
    // A third of the letters may differ.
    let near = distances.filter(|(distance, it)| *distance <= it.chars().count().max(3) / 3);
    // What was begun is rather meant than what is spelt otherwise.
    let nearest = near.min_by_key(|(distance, it)| (*distance, !it.starts_with(word)));
    nearest.map(|(_, it)| it)
}

/// How many letters must be added, left out, exchanged or swapped with the next to make one word of the other: the optimal
/// string alignment distance.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for (row, letter) in one.iter().enumerate() {
        let mut next = vec![row + 1];
        for (column, with) in other.iter().enumerate() {
            let exchanged = last[column] + usize::from(letter != with);
            let changed = exchanged.min(last[column + 1] + 1).min(next[column] + 1);
            let are_swapped =
                row > 0 && column > 0 && one[row - 1] == *with && other[column - 1] == *letter;
            next.push(match are_swapped {
                true => changed.min(before_last[column - 1] + 1),
                false => changed,
            });
        }
        before_last = std::mem::replace(&mut last, next);
    }
    last[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_finds_its_word_and_another_word_finds_none() {
        let known = ["status", "sync", "check", "explain"];
        for (word, meant) in [
            ("stauts", Some("status")),
            ("exlpain", Some("explain")),
            ("chek", Some("check")),
            ("snyc", Some("sync")),
            ("restart", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), meant, "{word}");
        }
        assert_eq!(nearest("pp0", ["ppp0", "ppp1"]), Some("ppp0"));
    }
}
