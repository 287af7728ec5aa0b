package api

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	flowcontrol "k8s.io/api/flowcontrol/v1"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
	fq "k8s.io/apiserver/pkg/util/flowcontrol/fairqueuing"
	fcrequest "k8s.io/apiserver/pkg/util/flowcontrol/request"
)

// everybody lets all requests pass.
type everybody struct{ utilflowcontrol.Interface }

func (everybody) Handle(_ context.Context, _ utilflowcontrol.RequestDigest, _ func(*flowcontrol.FlowSchema, *flowcontrol.PriorityLevelConfiguration, string),
	_ func() fcrequest.WorkEstimate, _ fq.QueueNoteFn, exec func()) {
	exec()
}

func digest(name, verb string, groups ...string) utilflowcontrol.RequestDigest {
	return utilflowcontrol.RequestDigest{User: &user.DefaultInfo{Name: name, Groups: groups}, RequestInfo: &apirequest.RequestInfo{Verb: verb}}
}

// Of one user's requests a few are under way, of others' as many as of his; what waits too long, or is one too many, is refused, and nothing is left behind.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := newTurns(everybody{})
		turn.alone = [kindCount]int{reads: 4, writes: 8, lists: 1}
		turn.shared = turn.alone
		ctx, cancel := context.WithCancel(context.Background())
		hold := make(chan struct{})
		running, done, refused := map[string]int{}, 0, 0
		events := make(chan func(), 4*maxWaiting)
		ask := func(ctx context.Context, name, verb string, groups ...string) {
			v := &verdict{}
			go func() {
				turn.Handle(context.WithValue(ctx, verdictKey{}, v), digest(name, verb, groups...), nil, nil, nil, func() {
					if v.refused.Load() {
						events <- func() { refused++ }
						return
					}
					events <- func() { running[name+" "+verb]++ }
					<-hold
				})
				events <- func() { done++ }
			}()
		}
		settle := func() {
			synctest.Wait()
			for {
				select {
				case f := <-events:
					f()
				default:
					return
				}
			}
		}
		for range 100 {
			ask(ctx, "bad", "get")
			ask(ctx, "bad", "update")
			ask(ctx, "root", "get", user.SystemPrivilegedGroup)
		}
		for range 3 {
			ask(ctx, "good", "get")
		}
		settle()
		if want := fmt.Sprint(map[string]int{"bad get": 4, "bad update": 8, "root get": 100, "good get": 3}); fmt.Sprint(running) != want {
			t.Errorf("under way are %v, want %s", running, want)
		}
		// Probes do not wait for others of nobody.
		for range 10 {
			go turn.Handle(ctx, utilflowcontrol.RequestDigest{User: &user.DefaultInfo{Name: "bad"}, RequestInfo: &apirequest.RequestInfo{Verb: "get", Path: "/readyz"}}, nil, nil, nil,
				func() { events <- func() { running["probe"]++ } })
		}
		settle()
		if running["probe"] != 10 {
			t.Errorf("%d of 10 probes", running["probe"])
		}
		// A list that takes long lets the next one go on.
		ask(ctx, "slow", "list")
		ask(ctx, "slow", "watch")
		settle()
		if running["slow list"]+running["slow watch"] != 1 {
			t.Errorf("two lists at once: %v", running)
		}
		time.Sleep(2*maxTurn + time.Millisecond) // as long again: others are there
		settle()
		if running["slow list"] != 1 || running["slow watch"] != 1 {
			t.Errorf("the second list still waits: %v", running)
		}
		// One too many is held, then refused; the same for who has no more time.
		for range maxWaiting - 92 + 5 {
			ask(ctx, "bad", "get")
		}
		settle()
		if refused != 0 {
			t.Errorf("%d are refused at once", refused)
		}
		time.Sleep(punish)
		settle()
		if refused != 5 {
			t.Errorf("%d are refused, want 5", refused)
		}
		short, end := context.WithTimeout(ctx, time.Millisecond)
		ask(short, "bad", "delete")
		time.Sleep(2 * time.Millisecond)
		settle()
		end()
		if refused != 6 {
			t.Errorf("%d are refused, want 6", refused)
		}
		// All come to an end.
		cancel()
		close(hold)
		settle()
		time.Sleep(maxTurn)
		settle()
		if want := 300 + 3 + 2 + maxWaiting - 92 + 5 + 1; done != want {
			t.Errorf("%d ended of %d", done, want)
		}
		if len(turn.users) != 0 {
			t.Errorf("%d users are remembered", len(turn.users))
		}
	})
}

// A user with a long line gets more turns while nobody else is there; in company each takes as long again to begin.
func TestTurnsInCompany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const takes = 10 * time.Millisecond
		turn := newTurns(everybody{})
		turn.alone, turn.shared = [kindCount]int{4, 4, 4}, [kindCount]int{1, 1, 1}
		var mu sync.Mutex // guards the rest
		under, most, done := 0, 0, 0
		ask := func(name string, groups ...string) {
			turn.Handle(context.WithValue(t.Context(), verdictKey{}, &verdict{}), digest(name, "get", groups...), nil, nil, nil, func() {
				mu.Lock()
				under++
				most = max(most, under)
				mu.Unlock()
				time.Sleep(takes)
				mu.Lock()
				under--
				done++
				mu.Unlock()
			})
		}
		line := func(n int) (took time.Duration, atOnce int) {
			most = 0
			began := time.Now()
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() { ask("bad") })
			}
			wg.Wait()
			return time.Since(began), most
		}
		if took, n := line(40); took != 10*takes || n != 4 {
			t.Errorf("alone 40 requests took %s, %d at once", took, n)
		}
		ask("system:apiserver", user.SystemPrivilegedGroup) // nobody
		if took, n := line(4); took != takes || n != 4 {
			t.Errorf("beside this process itself 4 requests took %s, %d at once", took, n)
		}
		for _, who := range [][]string{{"good"}, {"root", user.SystemPrivilegedGroup}} {
			ask(who[0], who[1:]...)
			if took, n := line(10); took != (10+9)*takes || n != 1 { // the last one has nobody behind it
				t.Errorf("beside %s 10 requests took %s, %d at once", who[0], took, n)
			}
			// One after the other is no line: nobody is slowed.
			began := time.Now()
			for range 10 {
				ask("bad")
			}
			if took := time.Since(began); took != 10*takes {
				t.Errorf("10 requests one after the other took %s", took)
			}
			time.Sleep(companyFor)
			if took, n := line(40); took != 10*takes || n != 4 {
				t.Errorf("alone again 40 requests took %s, %d at once", took, n)
			}
		}
		if len(turn.users) != 0 {
			t.Errorf("%d users are remembered", len(turn.users))
		}
	})
}

// A list makes room for others while its user has more of them in line, in company; nobody else's does, and nothing else.
func TestListsRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := newTurns(everybody{})
		turn.alone, turn.shared = [kindCount]int{1, 1, 1}, [kindCount]int{1, 1, 1}
		hold := make(chan struct{})
		ask := func(name, verb string) *verdict {
			v := &verdict{}
			go turn.Handle(context.WithValue(t.Context(), verdictKey{}, v), digest(name, verb), nil, nil, nil, func() { <-hold })
			synctest.Wait()
			return v
		}
		rests := func(what string, v *verdict, worked, want time.Duration) {
			t.Helper()
			began := time.Now()
			v.Rest(worked)
			if took := time.Since(began); took != want {
				t.Errorf("%s: a rest of %s, want %s", what, took, want)
			}
		}
		const worked = 2 * time.Millisecond
		list, read := ask("bad", "list"), ask("bad", "get")
		ask("bad", "get")
		rests("alone", list, worked, 0)
		other := ask("good", "list")
		rests("without others in line", list, worked, 0)
		ask("bad", "list")
		rests("in line and in company", list, worked, worked)
		rests("after long work", list, time.Second, maxRest)
		rests("the other", other, worked, 0)
		rests("a read", read, worked, 0)
		close(hold)
		time.Sleep(maxTurn) // the next list begins as much later as the first one took
		rests("later", list, worked, 0)
	})
}

// Failures from one address are slowed down, others' and successes are not.
func TestStrangersAreSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := slowStrangers(authenticator.RequestFunc(func(r *http.Request) (*authenticator.Response, bool, error) {
			return &authenticator.Response{}, r.Header.Get("Authorization") == "good", nil
		}))
		ask := func(address, token string) time.Duration {
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			r.RemoteAddr = address
			r.Header.Set("Authorization", token)
			began := time.Now()
			if _, ok, _ := a.AuthenticateRequest(r); ok != (token == "good") {
				t.Errorf("%s is %v", token, ok)
			}
			return time.Since(began)
		}
		for range failuresAtOnce {
			if d := ask("192.0.2.1:1", "bad"); d != 0 {
				t.Fatalf("held for %s", d)
			}
		}
		if d := ask("192.0.2.1:2", "bad"); d != punish {
			t.Errorf("one too many is held for %s", d)
		}
		for range 1000 {
			if d := ask("192.0.2.1:3", "good"); d != 0 {
				t.Fatalf("the right token is held for %s", d)
			}
		}
		if d := ask("192.0.2.2:1", "bad"); d != 0 {
			t.Errorf("another address is held for %s", d)
		}
	})
}
