package host

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestLateness: every request is told that it is late, not earlier than its bound and
// not later than a tenth after it; those that begin together share a timer.
func TestLateness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 10 * time.Second
		l := newLateness(bound)
		if l.begin(time.Now()) != l.begin(time.Now().Add(bound/20)) {
			t.Error("two requests at the same time have a timer each")
		}
		for range 25 {
			began := time.Now()
			c := l.begin(began)
			go func() {
				<-c
				if d := time.Since(began); d < bound || d > bound+bound/10 {
					t.Errorf("late after %v", d)
				}
			}()
			time.Sleep(333 * time.Millisecond)
		}
		time.Sleep(2 * bound)
		synctest.Wait()
	})
}
