package host

import (
	"errors"
	"runtime"
	"sync"
	"testing"
)

func begun(r *readRound) bool {
	select {
	case <-r.begin:
		return true
	default:
		return false
	}
}

// TestReadsShareRounds: who comes before a round begins takes part in it; who comes while a round is under way is answered by the next
// one, never by the present one, and all of them by the same.
func TestReadsShareRounds(t *testing.T) {
	var q reads
	first, mine := q.join()
	if !mine || !begun(first) {
		t.Fatal("a lone reader has to wait")
	}
	if r, mine := q.join(); mine || r != first {
		t.Fatal("a reader does not share the round that is about to begin")
	}
	q.begin()
	second, mine := q.join()
	if !mine || second == first || begun(second) {
		t.Fatal("a reader took part in a round that was under way")
	}
	for range 3 {
		if r, mine := q.join(); mine || r != second {
			t.Fatal("later readers do not share the next round")
		}
	}
	q.end(first, nil)
	if !begun(second) {
		t.Fatal("the next round was not begun")
	}
	if r, mine := q.join(); mine || r != second {
		t.Fatal("a reader does not share the next round, which is about to begin")
	}
	q.begin()
	if third, mine := q.join(); !mine || begun(third) {
		t.Fatal("a reader took part in a round that was under way")
	}
	failed := errors.New("failed")
	q.end(second, failed)
	if <-second.done; second.err != failed {
		t.Fatalf("those who waited got %v", second.err)
	}
}

// TestReadsAbandoned: when the reader that is to run the next round goes away, the
// others are told, and nobody waits for it.
func TestReadsAbandoned(t *testing.T) {
	var q reads
	first, _ := q.join()
	q.begin()
	second, _ := q.join()
	q.end(second, errAgain)
	if <-second.done; second.err != errAgain || begun(second) {
		t.Fatal("those who waited were not told")
	}
	third, mine := q.join()
	if !mine || begun(third) {
		t.Fatal("the round after one that was given up is not a new one")
	}
	q.end(first, nil)
	if !begun(third) {
		t.Fatal("the next round was not begun")
	}
	q.end(third, nil)
	if r, mine := q.join(); !mine || !begun(r) {
		t.Fatal("a lone reader has to wait")
	}
}

// TestReadsConcurrently: at most one round is under way, and every reader is answered.
func TestReadsConcurrently(t *testing.T) {
	var q reads
	var wg sync.WaitGroup
	var mu sync.Mutex // guards underWay, rounds
	underWay, rounds := 0, 0
	const readers, times = 16, 200
	for range readers {
		wg.Go(func() {
			for range times {
				r, mine := q.join()
				if !mine {
					<-r.done
					continue
				}
				<-r.begin
				runtime.Gosched()
				q.begin()
				mu.Lock()
				if underWay++; underWay > 1 {
					t.Error("two rounds at a time")
				}
				rounds++
				mu.Unlock()
				mu.Lock()
				underWay--
				mu.Unlock()
				q.end(r, nil)
			}
		})
	}
	wg.Wait()
	t.Logf("%d reads in %d rounds", readers*times, rounds)
}

// TestReadsAbandonedBeforeTheyBegin: the same for a round that is about to begin.
func TestReadsAbandonedBeforeTheyBegin(t *testing.T) {
	var q reads
	first, _ := q.join()
	if r, mine := q.join(); mine || r != first {
		t.Fatal("the round is not shared")
	}
	q.end(first, errAgain)
	if <-first.done; first.err != errAgain {
		t.Fatal("those who waited were not told")
	}
	if r, mine := q.join(); !mine || r == first || !begun(r) {
		t.Fatal("a lone reader has to wait")
	}
}
