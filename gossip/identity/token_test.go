package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func testToken(t testing.TB) Token {
	t.Helper()
	token, err := NewToken(sha256.Sum256([]byte("a CA")), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestTokenRoundTrip(t *testing.T) {
	token := testToken(t)
	text := token.String()
	if strings.ToLower(text) != text || strings.Count(text, ".") != 3 || !strings.HasPrefix(text, "skein1.") {
		t.Errorf("token text %q is not skein1.<ca>.<id>.<secret> in lower case", text)
	}
	for _, s := range []string{text, " " + text + "\n"} {
		back, err := ParseToken(s)
		if err != nil || back != token {
			t.Errorf("ParseToken(%q) = %+v, %v; want %+v", s, back, err, token)
		}
	}
	if other := testToken(t); other.ID == token.ID || other.Secret == token.Secret {
		t.Errorf("two tokens share id or secret: %v %v", token, other)
	}
	if !ValidTokenID(token.ID) || ValidTokenID("../x") {
		t.Error("ValidTokenID is wrong about a good or a bad id")
	}
}

func TestNewTokenReportsLackOfRandomness(t *testing.T) {
	if _, err := NewToken([32]byte{}, bytes.NewReader(make([]byte, 3))); err == nil {
		t.Fatal("a token was made of 3 random bytes")
	}
}

func TestTokenSecretStaysOutOfLogs(t *testing.T) {
	token := testToken(t)
	var out bytes.Buffer
	slog.New(slog.NewTextHandler(&out, nil)).Info("made", "token", token)
	if strings.Contains(out.String(), token.Secret) || !strings.Contains(out.String(), token.ID) {
		t.Errorf("log line %q should hold the id and not the secret", out.String())
	}
}

func TestParseTokenSaysWhatIsWrong(t *testing.T) {
	good := testToken(t)
	parts := strings.Split(good.String(), ".")
	with := func(n int, s string) string {
		p := append([]string(nil), parts...)
		p[n] = s
		return strings.Join(p, ".")
	}
	for _, c := range []struct{ name, text, want string }{
		{"empty", "  ", "empty"},
		{"other words", "kubeadm", "does not begin with"},
		{"bootstrap token", "abcdef.0123456789abcdef", "does not begin with"},
		{"newer version", with(0, "skein2"), "another version"},
		{"cut off", strings.Join(parts[:3], "."), "3 parts"},
		{"too many", good.String() + ".x", "5 parts"},
		{"short hash", with(1, parts[1][:51]), "hash of the cluster's CA"},
		{"bad hash", with(1, strings.Repeat("1", len(parts[1]))), "hash of the cluster's CA"},
		{"stray bits", with(1, strings.Repeat("a", len(parts[1])-1)+"b"), "hash of the cluster's CA"},
		{"short id", with(2, "abc"), "the id, has 3 characters"},
		{"path id", with(2, "ab/cd/ef"), "the id"},
		{"upper case secret", with(3, strings.ToUpper(parts[3])), "the secret, holds characters"},
		{"line break in secret", with(3, parts[3][:16]+"\n"+parts[3][17:]), "the secret, holds characters"},
		{"half a secret", with(3, parts[3][:16]), "the secret, has 16 characters instead of 32"},
		{"endless", strings.Repeat("a", 1000), "1000 characters"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseToken(c.text)
			if !errors.Is(err, ErrBadToken) || !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("error %q, want ErrBadToken with %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), good.Secret) {
				t.Errorf("the error repeats the secret: %v", err)
			}
		})
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(testToken(f).String())
	f.Add("skein1...")
	f.Add("skein1.aaaa.bbbb.cccc")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		token, err := ParseToken(s)
		if err != nil {
			if !errors.Is(err, ErrBadToken) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		// Whatever is accepted is written in one way only.
		if token.String() != strings.TrimSpace(s) {
			t.Fatalf("%q was read as %q", s, token.String())
		}
	})
}
