//! Numbers as people read them.

/// `400,000`
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `950`, `8,123`, `231 k`, `4.21 M`
pub fn rounded(number: f64) -> String {
    match number {
        number if number >= 1e6 => format!("{:.2} M", number / 1e6),
        number if number >= 1e5 => format!("{:.0} k", number / 1e3),
        number if number >= 1e4 => format!("{:.1} k", number / 1e3),
        number if number >= 100.0 => grouped(whole(number)),
        number if number >= 1.0 => format!("{number:.1}"),
        number => format!("{number:.4}"),
    }
}

/// `4.2 ms`
pub fn milliseconds(number: f64) -> String {
    if number < 100.0 { format!("{number:.2} ms") } else { format!("{number:.0} ms") }
}

/// `23.4 MiB`
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", ratio(bytes, 1 << 20))
}

/// One number divided by another.
#[expect(clippy::cast_precision_loss, reason = "counts here are far below the 53 bits that are exact")]
pub fn ratio(one: u64, other: u64) -> f64 {
    one as f64 / other as f64
}

/// So many a second.
pub fn per_second(count: u64, elapsed: std::time::Duration) -> f64 {
    ratio(count, 1) / elapsed.as_secs_f64()
}

/// The middle one.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive and rounded")]
fn whole(number: f64) -> u64 {
    number.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_rounded() {
        assert_eq!([0, 12, 1_234, 400_000].map(grouped), ["0", "12", "1,234", "400,000"]);
        let texts = [0.001_23, 7.25, 950.4, 8_123.0, 23_456.0, 231_400.0, 4_213_000.0].map(rounded);
        assert_eq!(texts, ["0.0012", "7.2", "950", "8,123", "23.5 k", "231 k", "4.21 M"]);
    }
}
