package volume

import (
	"context"
	"fmt"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TokenStore keeps ServiceAccount tokens over a restart.
type TokenStore interface {
	Token(pod types.UID, key string) *authv1.TokenRequest
	PutToken(pod types.UID, key string, t *authv1.TokenRequest)
	DeleteTokens(pod types.UID)
}

const (
	// defaultTokenLife applies when the volume names none (the API's default, too).
	defaultTokenLife = time.Hour
	// maxTokenAge: a token is replaced after a day at the latest, as by kubelet.
	maxTokenAge = 24 * time.Hour
	// tokenRetry is the pause after a failed request while an older token is still in use.
	tokenRetry = 10 * time.Second
)

func tokenKey(p *corev1.ServiceAccountTokenProjection) string {
	return fmt.Sprintf("%s/%d", p.Audience, tokenSeconds(p))
}

func tokenSeconds(p *corev1.ServiceAccountTokenProjection) int64 {
	if p.ExpirationSeconds == nil {
		return int64(defaultTokenLife / time.Second)
	}
	return *p.ExpirationSeconds
}

// refreshAt is when a token is to be replaced: at 80 % of its life or after a day.
func refreshAt(t *authv1.TokenRequest) time.Time {
	issued := t.CreationTimestamp.Time
	life := t.Status.ExpirationTimestamp.Sub(issued)
	return issued.Add(min(life*8/10, maxTokenAge))
}

// token returns the stored token while it is fresh, else asks for a new one. When that fails an older token goes on being
// used, expired or not: nothing better is to be had, and the pod should start.
func (m *Manager) token(ctx context.Context, pod *corev1.Pod, p *corev1.ServiceAccountTokenProjection) (string, error) {
	key, now := tokenKey(p), m.cfg.Now()
	old := m.cfg.Tokens.Token(pod.UID, key)
	if old != nil {
		due := refreshAt(old)
		if now.Before(due) {
			m.wakeAt(pod.UID, due)
			return old.Status.Token, nil
		}
		if retry := m.retryAfter(pod.UID, key); now.Before(retry) {
			m.wakeAt(pod.UID, retry)
			return old.Status.Token, nil
		}
	}
	secs := tokenSeconds(p)
	req := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{ExpirationSeconds: &secs,
		BoundObjectRef: &authv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}}}
	if p.Audience != "" {
		req.Spec.Audiences = []string{p.Audience}
	}
	sa := pod.Spec.ServiceAccountName
	if sa == "" {
		sa = "default"
	}
	fresh, err := m.cfg.RequestToken(ctx, pod.Namespace, sa, req)
	if err != nil {
		err = fmt.Errorf("failed to fetch token for ServiceAccount %s/%s: %w", pod.Namespace, sa, err)
		if old == nil {
			return "", err
		}
		retry := now.Add(tokenRetry)
		m.setRetry(pod.UID, key, retry)
		m.wakeAt(pod.UID, retry)
		m.cfg.Logger.Warn("token not refreshed, the older one stays in use", "pod", pod.Namespace+"/"+pod.Name, "expires", old.Status.ExpirationTimestamp.Time, "err", err)
		return old.Status.Token, nil
	}
	fresh.CreationTimestamp = metav1.NewTime(now)
	m.cfg.Tokens.PutToken(pod.UID, key, fresh)
	m.wakeAt(pod.UID, refreshAt(fresh))
	return fresh.Status.Token, nil
}
