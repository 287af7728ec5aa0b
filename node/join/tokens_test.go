package join

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/gossip/identity"
)

// clock is a time that tests set.
type clock struct{ atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.Store(time.Now().Unix())
	return c
}
func (c *clock) now() time.Time          { return time.Unix(c.Load(), 0) }
func (c *clock) advance(d time.Duration) { c.Add(int64(d / time.Second)) }

func testTokens(t *testing.T) (*TokenStore, *clock, clientv3.KV) {
	kv, c := testKV(t), newClock()
	s := NewTokenStore(kv, sha256.Sum256([]byte("CA")))
	s.now = c.now
	return s, c, kv
}

func create(t *testing.T, s *TokenStore, o TokenOptions) identity.Token {
	t.Helper()
	token, _, err := s.Create(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestTokenLife(t *testing.T) {
	s, c, kv := testTokens(t)
	ctx := context.Background()
	token, info, err := s.Create(ctx, TokenOptions{Description: "rack 7", TTL: DefaultTokenTTL, MaxUses: 2})
	if err != nil {
		t.Fatal(err)
	}
	if token.CAHash != s.caHash || info.Description != "rack 7" || info.Expires.Sub(info.Created) != DefaultTokenTTL || info.MaxUses != 2 {
		t.Errorf("created %+v %+v", token, info)
	}
	// What is stored must not let anyone in.
	all, err := kv.Get(ctx, "/", clientv3.WithPrefix())
	if err != nil || len(all.Kvs) != 1 || string(all.Kvs[0].Key) != "/skein/tokens/"+token.ID {
		t.Fatalf("stored %v, %v", all, err)
	}
	if strings.Contains(string(all.Kvs[0].Value), token.Secret) {
		t.Errorf("the secret is in the store: %s", all.Kvs[0].Value)
	}
	if got, err := s.Verify(ctx, token.ID, token.Secret); err != nil || got != info {
		t.Errorf("Verify = %+v, %v; created %+v", got, err, info)
	}
	forever := create(t, s, TokenOptions{})
	other := create(t, s, TokenOptions{TTL: time.Hour})
	for name, bad := range map[string][2]string{
		"wrong secret": {token.ID, other.Secret}, "empty secret": {token.ID, ""}, "unknown id": {"aaaaaaaa", token.Secret},
		"path": {"../joined/n1", token.Secret}, "empty": {"", ""},
	} {
		if _, err := s.Verify(ctx, bad[0], bad[1]); !errors.Is(err, ErrTokenUnknown) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list, err := s.List(ctx); err != nil || len(list) != 3 {
		t.Errorf("List = %+v, %v", list, err)
	}

	if err := s.Revoke(ctx, other.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Revoke(ctx, other.ID); err != nil {
		t.Errorf("revoked again: %v", err)
	}
	if err := s.Revoke(ctx, "aaaaaaaa"); !errors.Is(err, ErrTokenUnknown) {
		t.Errorf("unknown revoked: %v", err)
	}
	if _, err := s.Verify(ctx, other.ID, other.Secret); !errors.Is(err, ErrTokenRevoked) || !strings.Contains(err.Error(), "skein token create") {
		t.Errorf("revoked: %v", err)
	}
	if _, err := s.Verify(ctx, other.ID, token.Secret); !errors.Is(err, ErrTokenUnknown) {
		t.Errorf("revoked, and without the secret: %v", err)
	}

	c.advance(DefaultTokenTTL - time.Second)
	if _, err := s.Verify(ctx, token.ID, token.Secret); err != nil {
		t.Errorf("a second before it expires: %v", err)
	}
	c.advance(time.Second)
	if _, err := s.Verify(ctx, token.ID, token.Secret); !errors.Is(err, ErrTokenExpired) {
		t.Errorf("expired: %v", err)
	}
	c.advance(1000 * 24 * time.Hour)
	if _, err := s.Verify(ctx, forever.ID, forever.Secret); err != nil {
		t.Errorf("a token without end: %v", err)
	}
	// Old ones go when a new one comes.
	last := create(t, s, TokenOptions{})
	list, err := s.List(ctx)
	if err != nil || len(list) != 2 || list[0].ID != forever.ID || list[1].ID != last.ID {
		t.Errorf("after years: %+v, %v", list, err)
	}
}

func TestCreateRefuses(t *testing.T) {
	s, _, _ := testTokens(t)
	ctx := context.Background()
	_, _, err := s.Create(ctx, TokenOptions{TTL: -time.Hour, MaxUses: -1, Description: strings.Repeat("x", 300)})
	for _, want := range []string{"expired 1h0m0s ago", "-1 uses", "300 bytes"} {
		if !errors.Is(err, ErrBadRequest) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
	for range maxTokens {
		create(t, s, TokenOptions{})
	}
	if _, _, err := s.Create(ctx, TokenOptions{}); !errors.Is(err, ErrBadRequest) || !strings.Contains(err.Error(), "256 tokens") {
		t.Errorf("one more than the bound: %v", err)
	}
}

func TestStoreTroubleIsNotAVerdict(t *testing.T) {
	s, _, kv := testTokens(t)
	token := create(t, s, TokenOptions{})
	ctx := context.Background()
	broken := NewTokenStore(brokenKV{kv}, s.caHash)
	if _, err := broken.Verify(ctx, token.ID, token.Secret); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrTokenUnknown) {
		t.Errorf("no leader: %v", err)
	}
	for _, record := range []string{"{", `{"version":2}`, `{"version":1,"hash":"AAAA"}`} {
		if _, err := kv.Put(ctx, tokenPrefix+token.ID, record); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Verify(ctx, token.ID, token.Secret); err == nil || errors.Is(err, ErrTokenUnknown) {
			t.Errorf("record %s: %v", record, err)
		}
	}
}

func keyHash(n byte) (h [sha256.Size]byte) { h[0] = n; return h }

func TestEnrol(t *testing.T) {
	s, c, _ := testTokens(t)
	ctx := context.Background()
	token := create(t, s, TokenOptions{MaxUses: 2, TTL: time.Hour})
	uses := func() int {
		list, err := s.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return list[0].Uses
	}
	for i, step := range []struct {
		what  string
		claim Claim
		after time.Duration
		want  error
		uses  int
	}{
		{"a new node", Claim{Name: "n1", KeyHash: keyHash(1), TokenID: token.ID}, 0, nil, 1},
		{"again, as the answer was lost", Claim{Name: "n1", KeyHash: keyHash(1), TokenID: token.ID}, 0, nil, 1},
		{"again, while it runs", Claim{Name: "n1", KeyHash: keyHash(1), TokenID: token.ID, Exists: true}, 0, nil, 1},
		{"another machine, same name, at once", Claim{Name: "n1", KeyHash: keyHash(2), TokenID: token.ID}, time.Second, ErrNameTaken, 1},
		{"another machine, and the node runs", Claim{Name: "n1", KeyHash: keyHash(2), TokenID: token.ID, Exists: true}, time.Hour / 2, ErrNameTaken, 1},
		{"another machine, and the first never came", Claim{Name: "n1", KeyHash: keyHash(2), TokenID: token.ID}, 0, nil, 2},
		{"used up", Claim{Name: "n2", KeyHash: keyHash(3), TokenID: token.ID}, 0, ErrTokenUsedUp, 2},
		{"used up, but known", Claim{Name: "n1", KeyHash: keyHash(2), TokenID: token.ID}, 0, nil, 2},
		{"exists, and was never recorded", Claim{Name: "n7", KeyHash: keyHash(3), Exists: true}, 0, ErrNameTaken, 2},
		{"the founder", Claim{Name: "n0", KeyHash: keyHash(9)}, 0, nil, 2},
		{"the founder joins its own cluster", Claim{Name: "n0", KeyHash: keyHash(9), TokenID: token.ID, Exists: true}, 0, nil, 2},
		{"expired between check and use", Claim{Name: "n3", KeyHash: keyHash(3), TokenID: token.ID}, time.Hour, ErrTokenExpired, 2},
		{"bad name", Claim{Name: "../tokens/x", KeyHash: keyHash(3)}, 0, identity.ErrBadName, 2},
	} {
		c.advance(step.after)
		err := s.Enrol(ctx, step.claim)
		if !errors.Is(err, step.want) || (step.want == nil) != (err == nil) {
			t.Errorf("%d, %s: %v, want %v", i, step.what, err, step.want)
		}
		if got := uses(); got != step.uses {
			t.Errorf("%d, %s: %d uses, want %d", i, step.what, got, step.uses)
		}
	}
	if err := s.Release(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Enrol(ctx, Claim{Name: "n1", KeyHash: keyHash(4)}); err != nil {
		t.Errorf("a released name: %v", err)
	}
}

// Many machines at once, through several replicas: each name goes to one of them, and no token is used more than it may be.
func TestEnrolAtOnce(t *testing.T) {
	s, _, kv := testTokens(t)
	ctx := context.Background()
	token := create(t, s, TokenOptions{MaxUses: 3})
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[string]int{}
	var other []error
	for machine := range 12 {
		wg.Go(func() {
			replica := NewTokenStore(kv, s.caHash)
			name := fmt.Sprintf("n%d", machine%4)
			for {
				err := replica.Enrol(ctx, Claim{Name: name, KeyHash: keyHash(byte(machine)), TokenID: token.ID})
				if errors.Is(err, ErrUnavailable) {
					continue // disturbed too often; a client tries again too
				}
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					got[name]++
				case !errors.Is(err, ErrNameTaken) && !errors.Is(err, ErrTokenUsedUp):
					other = append(other, err)
				}
				return
			}
		})
	}
	wg.Wait()
	total := 0
	for name, n := range got {
		total += n
		if n > 1 {
			t.Errorf("%s was given to %d machines", name, n)
		}
	}
	list, err := s.List(ctx)
	if total != 3 || len(other) > 0 || err != nil || list[0].Uses != 3 {
		t.Errorf("%d machines of 3 were let in (%v), errors %v, token %+v %v", total, got, other, list, err)
	}
}

func FuzzDecodeRecords(f *testing.F) {
	f.Add([]byte(`{"version":1,"hash":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","id":"x","created":"2026-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"version":1,"keyHash":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := decodeToken(data); err == nil && (r.Version != 1 || len(r.Hash) != 32) {
			t.Fatalf("accepted %+v", r)
		}
		if r, err := decodeJoined(data); err == nil && (r.Version != 1 || len(r.KeyHash) != 32) {
			t.Fatalf("accepted %+v", r)
		}
	})
}
