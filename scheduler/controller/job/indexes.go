package job

import (
	"slices"
	"strconv"
	"strings"
)

// span is a range of completion indexes, both ends included.
type span struct{ first, last int }

// indexes is a set of completion indexes: spans that neither touch nor overlap,
// in ascending order. Its text form, as in a Job's status, is "1,3-5".
type indexes []span

// parseIndexes reads the text form, without what is not below completions. What
// cannot be read is left out: the text is this controller's own.
func parseIndexes(text string, completions int) (out indexes) {
	if text == "" {
		return nil
	}
	for _, part := range strings.Split(text, ",") {
		from, to, isRange := strings.Cut(part, "-")
		first, err := strconv.Atoi(from)
		if err != nil || first < 0 {
			continue
		}
		last := first
		if isRange {
			if last, err = strconv.Atoi(to); err != nil {
				continue
			}
		}
		if last = min(last, completions-1); first <= last {
			out = append(out, span{first, last})
		}
	}
	return out.normal()
}

// normal sorts and joins spans.
func (x indexes) normal() (out indexes) {
	x = slices.Clone(x)
	slices.SortFunc(x, func(a, b span) int { return a.first - b.first })
	for _, s := range x {
		if n := len(out); n > 0 && s.first <= out[n-1].last+1 {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// with is x and more.
func (x indexes) with(more ...int) indexes {
	out := slices.Clone(x)
	for _, i := range more {
		out = append(out, span{i, i})
	}
	return out.normal()
}

func (x indexes) has(i int) bool {
	at, exact := slices.BinarySearchFunc(x, i, func(s span, i int) int { return s.first - i })
	return exact || at > 0 && x[at-1].last >= i
}

func (x indexes) total() (n int) {
	for _, s := range x {
		n += s.last - s.first + 1
	}
	return n
}

// overlap counts the indexes that are in both.
func (x indexes) overlap(o indexes) (n int) {
	for i, j := 0, 0; i < len(x) && j < len(o); {
		n += max(0, min(x[i].last, o[j].last)-max(x[i].first, o[j].first)+1)
		if x[i].last < o[j].last {
			i++
		} else {
			j++
		}
	}
	return n
}

// missing returns the first n of [0, completions) that are not in x.
func (x indexes) missing(n, completions int) (out []int) {
	next := 0
	for _, s := range append(slices.Clone(x), span{completions, completions}) {
		for ; next < s.first && next < completions && len(out) < n; next++ {
			out = append(out, next)
		}
		next = max(next, s.last+1)
	}
	return out
}

func (x indexes) String() string {
	var b strings.Builder
	for i, s := range x {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Itoa(s.first))
		switch {
		case s.last == s.first+1:
			b.WriteByte(',')
			b.WriteString(strconv.Itoa(s.last))
		case s.last > s.first:
			b.WriteByte('-')
			b.WriteString(strconv.Itoa(s.last))
		}
	}
	return b.String()
}
